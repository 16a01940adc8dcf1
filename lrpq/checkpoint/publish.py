"""A folder that appears whole or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lrpq.errors import ConfigError, OutputBusy

MANIFEST = "lrpq.json"


@contextmanager
def published_folder(output: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder that becomes ``output`` on leaving and vanishes on an exception.

    The folder is ``.NAME.partial`` beside ``output``, so that the last step is a rename. A kill leaves it
    there; the next call for the same output empties it. Its lock is the kernel's and ends with the process:
    what a dead process left is told from what a living one writes. With ``overwrite`` the old folder is kept
    until the new one is complete, moved to ``.NAME.replaced`` for the moment between two renames, and put
    back by the next call if a kill fell into that moment.

    Raises:
        ConfigError: the output cannot be written (:func:`check_output`).
        OutputBusy: another process is writing it.
    """
    output = output.resolve()
    check_output(output, overwrite=overwrite)
    partial = output.with_name(f".{output.name}.partial")
    replaced = output.with_name(f".{output.name}.replaced")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(partial, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"output {output}: cannot be created ({error.strerror}); give another folder") from error
    try:
        _lock(lock, partial, output)
        _clear(partial)
        if replaced.exists() and not output.exists():
            replaced.rename(output)
            check_output(output, overwrite=overwrite)
        elif replaced.exists():
            shutil.rmtree(replaced)
        try:
            yield partial
            _sync(partial)
            if output.exists() and any(output.iterdir()):
                check_output(output, overwrite=overwrite)  # it may have been filled meanwhile
                output.rename(replaced)
            partial.rename(output)
        except BaseException:
            # also when interrupted; a kill leaves no time for this, hence the lock and the clearing above
            if replaced.exists() and not output.exists():
                replaced.rename(output)
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _fsync(output.parent)
        if replaced.exists():
            shutil.rmtree(replaced)
    finally:
        os.close(lock)


def check_output(output: Path, *, overwrite: bool = False) -> None:
    """Check, without writing, that a checkpoint may be put at ``output``.

    Raises:
        ConfigError: it is not a folder, is a mount point (a finished folder cannot be moved there), or is
            not empty; with ``overwrite``, not empty and without the manifest of an earlier checkpoint.
    """
    if not output.exists():
        return
    if not output.is_dir():
        raise ConfigError(f"output {output}: is a file; expected a new or an empty folder")
    if output.is_mount():
        raise ConfigError(f"output {output}: is a mount point; name a folder inside it")
    if any(output.iterdir()):
        if not overwrite:
            raise ConfigError(f"output {output}: is not empty; give another folder or allow it to be overwritten")
        if not (output / MANIFEST).is_file():
            raise ConfigError(
                f"output {output}: is not empty and holds no {MANIFEST}, so it is not a checkpoint of ours "
                "and is not overwritten; give another folder or empty it yourself"
            )


def _lock(lock: int, partial: Path, output: Path) -> None:
    busy = OutputBusy(f"output {output}: another process is writing it; wait for it or give another folder")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise busy from error
    # between our open and our lock the other process may have finished and renamed the very folder we hold
    if not partial.exists() or not os.path.samestat(os.fstat(lock), partial.stat()):
        raise busy


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _sync(folder: Path) -> None:
    """Have a folder's contents and names survive a power cut."""
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            _sync(entry)
        else:
            _fsync(entry)
    _fsync(folder)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
