"""Tensors written to files of a temporary folder by a thread, beside what the caller goes on to compute."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from torch import Tensor

Key = tuple[int, ...]
PREFIX = "lrpq-kept-"
UNDER_WAY = 3
"""Writes at most: each holds its tensor in host memory. One is written while the next are on their way from a GPU."""
_YOUNG_SECONDS = 60.0
"""A folder this young may just not have its lock yet."""


class Spill:
    """A folder with a lock that ends with the process, however that ends, and the writes that are under way.

    Args:
        where: in which the folder is made; what killed processes have left there is removed.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, where: Path) -> None:
        self._where = where
        with _named(where):
            _remove_abandoned(where)
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=where))
            self._lock = os.open(self.path, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="lrpq-spill")
        self._writes: dict[Key, Future[None]] = {}

    def start(self, key: Key, host: Callable[[], Tensor]) -> None:
        """Write a tensor, which ``host`` gives in the thread; it must not be changed until it is written."""
        self._writes[key] = self._writer.submit(self._write, key, host)

    def under_way(self) -> list[Key]:
        """Writes that have been started and not been asked for, the oldest first."""
        return list(self._writes)

    def is_done(self, key: Key) -> bool:
        """Whether a write has ended, well or not."""
        return self._writes[key].done()

    def finish(self, key: Key) -> None:
        """Wait for a write.

        Raises:
            OSError: it has failed; nothing is left of it.
        """
        self._writes.pop(key).result()

    def read(self, key: Key) -> Tensor:
        """Read a tensor that is written, and remove its file."""
        path = self._path(key)
        found: Tensor = load_file(path)["x"].clone()
        path.unlink()
        return found

    def remove(self, key: Key) -> None:
        """Remove the file of a tensor that is written."""
        self._path(key).unlink(missing_ok=True)

    def close(self) -> None:
        """Wait for the write that is being made, make no others, and remove everything."""
        self._writer.shutdown(wait=True, cancel_futures=True)
        self._writes.clear()
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)

    def _write(self, key: Key, host: Callable[[], Tensor]) -> None:
        path = self._path(key)
        try:
            with _named(self._where):
                save_file({"x": host().contiguous()}, path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def _path(self, key: Key) -> Path:
        return self.path / ("-".join(map(str, key)) + ".safetensors")


@contextlib.contextmanager
def _named(where: Path) -> Iterator[None]:
    """Errors that say what for; the package has its own error for a full disk."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot keep a block's inputs in {where}: {error}") from error


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
