"""Readers with the faults that the harness is there to find; the tests of the harness run them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors import safe_open

from lrpq.errors import StoreError

from . import readers
from .readers import Found, Reader

FILE = "a.txt"
VALID = b"0123456789" * 3


def _write(folder: Path) -> None:
    (folder / FILE).write_bytes(VALID)


def _reader(name: str, fault: Callable[[Path], object]) -> Reader:
    """A reader that is sound for the valid file only."""

    def read(folder: Path) -> Found:
        if (folder / FILE).read_bytes() != VALID:
            fault(folder)
            raise StoreError(f"{FILE} is damaged")
        return {}

    return Reader(name=name, write=(_write,), read=read, roles={FILE: "text"}, protected=True)


def _other_error(folder: Path) -> None:
    raise KeyError("x")


def _unnamed(folder: Path) -> None:
    raise StoreError("something is wrong")


def _two_lines(folder: Path) -> None:
    raise StoreError(f"{FILE}\nis damaged")


def _swallowed(folder: Path) -> None:
    try:
        np.empty(1 << 40)
    except MemoryError as error:
        raise StoreError(f"{FILE} is damaged") from error


def _shows_outside(folder: Path) -> None:
    raise StoreError(f"{FILE}: " + bytes.fromhex((folder.parent / "outside" / FILE).read_bytes().hex()).decode())


def _read_through_a_library(folder: Path) -> Found:
    """Opens a file where no audit hook sees it."""
    if (folder / FILE).read_bytes() == VALID:
        return {}
    with safe_open(folder / ".." / "outside" / "canary.safetensors", framework="np") as handle:
        return {"content": readers.digest(handle.get_tensor("canary").tobytes())}


READERS = (
    _reader("broken-none", lambda folder: None),
    _reader("broken-error", _other_error),
    _reader("broken-unnamed", _unnamed),
    _reader("broken-lines", _two_lines),
    _reader("broken-segfault", lambda folder: os.kill(os.getpid(), signal.SIGSEGV)),
    _reader("broken-exit", lambda folder: os._exit(3)),
    _reader("broken-hang", lambda folder: time.sleep(60)),
    _reader("broken-memory", lambda folder: np.ones(100 << 20, np.uint8)),
    _reader("broken-swallowed", _swallowed),
    _reader("broken-write", lambda folder: (folder / "new").write_bytes(b"")),
    _reader("broken-folder", lambda folder: (folder / "new").mkdir()),
    _reader("broken-outside", _shows_outside),
    Reader(name="broken-canary", write=(_write,), read=_read_through_a_library, roles={FILE: "text"}),
    Reader(
        name="broken-trust",
        write=(_write,),
        read=lambda folder: {"content": readers.digest((folder / FILE).read_bytes())},
        roles={FILE: "text"},
        protected=True,
    ),
)
