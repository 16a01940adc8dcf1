"""Block inputs kept between the two sweeps: in memory while they fit, else in files on local disk."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lrpq.model.host_copies import Fetched, HostCopies

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Key = tuple[int, ...]
PREFIX = "lrpq-kept-"
_AHEAD = 2
"""Tensors on their way back to a GPU at once."""
_YOUNG_SECONDS = 60.0
"""A folder this young may just not have its lock yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where a tensor came from."""

    device: torch.device
    shape: torch.Size
    dtype: torch.dtype
    held_bytes: int
    """In host memory; 0 of one that is spilled."""


class KeptInputs:
    """Tensors by key, each taken once. Those beyond ``memory_bytes`` are spilled to a folder of its own.

    Kept in host memory whatever device they come from, and given back on that device; a GPU goes on while they are
    copied from it, and back to it where ``expect`` says which come next. What a killed process left on disk is removed
    by the next one that spills there.

    Args:
        memory_bytes: how much stays in host memory.
        folder: where the spill folder is made; the system's temporary folder by default.
        may_forget: a tensor for which there is no room, neither in memory nor on disk, is not kept and can be computed
            again; otherwise that is an OSError.
    """

    def __init__(self, *, memory_bytes: int, folder: Path | None = None, may_forget: bool = False) -> None:
        self.memory_bytes = memory_bytes
        self.held_bytes = 0
        self.spilled_bytes = 0
        self.forgotten_bytes = 0
        self.may_forget = may_forget
        self._parent = folder
        self._held: dict[Key, Tensor | Future[Tensor]] = {}
        self._places: dict[Key, _Place] = {}
        self._expected: deque[Key] = deque()
        self._fetched: dict[Key, Future[Fetched]] = {}
        """On their way back to the GPU, ``_AHEAD`` at most."""
        self._spill: _SpillFolder | None = None
        self._own_copies: HostCopies | None = None

    def _copies(self, device: torch.device) -> HostCopies:
        if self._own_copies is None:
            self._own_copies = HostCopies(device)
        return self._own_copies

    @property
    def folder(self) -> Path:
        """Where the spill folder is made."""
        return Path(tempfile.gettempdir()) if self._parent is None else self._parent

    def __contains__(self, key: Key) -> bool:
        return key in self._places

    @property
    def count(self) -> int:
        """Tensors that have not been taken."""
        return len(self._places)

    def put(self, key: Key, tensor: Tensor) -> None:
        """Keep a tensor; it must not be changed afterwards. Those of a GPU are all of the same one.

        Raises:
            OSError: there is no room for it, and nothing may be forgotten.
        """
        size = tensor.numel() * tensor.element_size()
        if self.held_bytes + size <= self.memory_bytes:
            self._held[key] = self._copies(tensor.device).start(tensor) if _is_gpu(tensor.device) else tensor.cpu()
            self.held_bytes += size
        else:
            try:
                self._write(key, tensor.cpu())
            except OSError:
                if not self.may_forget:
                    raise
                self.forgotten_bytes += size
                return
            self.spilled_bytes += size
        self._places[key] = _Place(
            device=tensor.device, shape=tensor.shape, dtype=tensor.dtype, held_bytes=size if key in self._held else 0
        )

    def expect(self, keys: Iterable[Key]) -> None:
        """Say which tensors are taken next, in their order; those of a GPU come back to it beside what it computes."""
        self._expected = deque(key for key in keys if key in self)
        self._look_ahead()

    def take(self, key: Key) -> Tensor:
        """Return a tensor and forget it."""
        place = self._places[key]
        if _is_gpu(place.device):
            fetched = self._fetched.pop(key, None) or self._fetch(key)
            tensor = self._copies(place.device).arrived(fetched)
            del self._places[key]
            self.held_bytes -= place.held_bytes
            if self._expected and self._expected[0] == key:
                self._expected.popleft()
            self._look_ahead()
            return tensor
        del self._places[key]
        self.held_bytes -= place.held_bytes
        return self._on_host(key)()

    def _look_ahead(self) -> None:
        for key in islice(self._expected, _AHEAD):
            if key not in self._fetched and key in self and _is_gpu(self._places[key].device):
                self._fetched[key] = self._fetch(key)

    def _fetch(self, key: Key) -> Future[Fetched]:
        place = self._places[key]
        return self._copies(place.device).fetch(self._on_host(key), shape=place.shape, dtype=place.dtype)

    def _on_host(self, key: Key) -> Callable[[], Tensor]:
        """What gives a tensor, which is not kept any more then, in host memory."""
        if key in self._held:
            held = self._held.pop(key)
            return held.result if isinstance(held, Future) else lambda: held
        path = self._path(key)

        def read() -> Tensor:
            spilled: Tensor = load_file(path)["x"].clone()
            path.unlink()
            return spilled

        return read

    def forget_before(self, first: int) -> None:
        """Make room: forget the tensors of all blocks before this one."""
        for key in [key for key in self._places if key[0] < first]:
            if key in self._fetched:  # its memory may be given up when it has arrived
                self._copies(self._places[key].device).arrived(self._fetched.pop(key))
            elif key in self._held:
                held = self._held.pop(key)
                if isinstance(held, Future):
                    held.result()
            else:
                self._path(key).unlink(missing_ok=True)
            self.held_bytes -= self._places.pop(key).held_bytes

    def close(self) -> None:
        """Forget everything and remove the spill folder."""
        if self._own_copies is not None:
            self._own_copies.close()
            self._own_copies = None
        self._held.clear()
        self._places.clear()
        self._expected.clear()
        self._fetched.clear()
        self.held_bytes = 0
        if self._spill is not None:
            self._spill.close()
            self._spill = None

    def __enter__(self) -> KeptInputs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, key: Key, tensor: Tensor) -> None:
        path: Path | None = None
        try:
            if self._spill is None:
                self._spill = _SpillFolder(self.folder)
            path = self._path(key)
            save_file({"x": tensor.contiguous()}, path)
        except (OSError, SafetensorError) as error:  # the package has its own error for a full disk
            if path is not None:
                path.unlink(missing_ok=True)
            raise OSError(f"cannot keep a block's inputs in {self.folder}: {error}") from error

    def _path(self, key: Key) -> Path:
        if self._spill is None:
            raise KeyError(key)
        return self._spill.path / ("-".join(map(str, key)) + ".safetensors")


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


class _SpillFolder:
    """A temporary folder with a lock that ends with the process, however that ends."""

    def __init__(self, where: Path) -> None:
        _remove_abandoned(where)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=where))
        self._lock = os.open(self.path, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _remove_abandoned(where: Path) -> None:
    """Remove spill folders whose processes are gone: they may hold as much as the disk has."""
    for folder in where.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, or another process was faster
            if time.time() - folder.stat().st_mtime < _YOUNG_SECONDS:
                continue
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
