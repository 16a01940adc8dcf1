"""A store in a folder: temporary file, fsync, then link(), which fails where rename() would overwrite."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lrpq.errors import StoreError
from tasks.store.objects import check_key, is_key, one_line

_TEMPORARY = "~temporary"  # no valid key contains "~", so no key reaches into it
_STALE_SECONDS = 7 * 24 * 3600  # far longer than any write takes


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalStore:
    """Objects as files below a folder; safe for any number of processes, also over NFS."""

    root: Path
    """The folder, absolute, symbolic links resolved."""
    url: str
    """As the user gave it."""

    @classmethod
    def open_tested(cls, folder: Path, *, url: str) -> LocalStore:
        """Create the folder if absent and test writing and linking in it.

        Raises:
            StoreError: not writable, or the file system has no hard links.
        """
        try:
            _make_folder(Path(os.path.abspath(folder)) / _TEMPORARY)
            store = cls(root=folder.resolve(), url=url)
            store._sweep()
            store._probe()
        except (OSError, RuntimeError) as error:  # RuntimeError: a loop of symbolic links
            raise StoreError(f"cannot write to the store {url}: {one_line(error)}") from error
        return store

    def exists(self, key: str) -> bool:
        """Whether the object has been published."""
        path = self._path(key)
        with self._reporting("look up", key):
            return path.is_file()

    def publish(self, key: str, write: Callable[[BinaryIO], None]) -> bool:
        """See ObjectStore: True if what ``write`` wrote is the object now."""
        if self.exists(key):
            return False
        path = self._path(key)
        with self._reporting("write", key), self._temporary() as (temporary, file):
            write(file)
            file.flush()
            os.fsync(file.fileno())
            _make_folder(path.parent)
            try:
                os.link(temporary, path)
            except FileExistsError:
                # Over NFS a repeated request answers so although the first one made the link (open(2),
                # O_EXCL).
                if os.fstat(file.fileno()).st_nlink != 2:
                    return False
            _fsync_folder(path.parent)
        return True

    def open(self, key: str) -> BinaryIO:
        """The object, seekable."""
        path = self._path(key)
        with self._reporting("read", key):
            return path.open("rb")

    def list(self, prefix: str = "") -> Iterator[str]:
        """Keys of all objects below the folder ``prefix``, sorted."""
        segments = check_key(prefix, folder=True)
        with self._reporting("list", prefix):
            yield from sorted(_keys(self._path(prefix, folder=True), segments))

    def folders(self, prefix: str = "") -> Iterator[str]:
        """Names of the folders directly below ``prefix``, sorted."""
        folder = self._path(prefix, folder=True)
        with self._reporting("list", prefix):
            yield from sorted(name for name, path in _entries(folder) if path.is_dir())

    def size(self, key: str) -> int:
        """Length in bytes."""
        path = self._path(key)
        with self._reporting("read", key):
            return path.stat().st_size

    def delete(self, key: str) -> None:
        """Remove the object; no error if there is none."""
        path = self._path(key)
        with self._reporting("delete", key):
            path.unlink(missing_ok=True)

    def _path(self, key: str, *, folder: bool = False) -> Path:
        path = self.root.joinpath(*check_key(key, folder=folder))
        try:
            inside = path.resolve().is_relative_to(self.root)
        except (OSError, RuntimeError) as error:
            raise StoreError(f"cannot look up {key} in {self.url}: {one_line(error)}") from error
        if not inside:
            raise StoreError(f"{key} leaves the store {self.url} through a symbolic link: remove that link")
        return path

    @contextmanager
    def _temporary(self) -> Iterator[tuple[Path, BinaryIO]]:
        path = self.root / _TEMPORARY / f"{os.getpid()}-{uuid.uuid4().hex}"
        try:
            with path.open("xb") as file:
                yield path, file
        finally:
            path.unlink(missing_ok=True)

    @contextmanager
    def _reporting(self, what: str, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if what == "read" and isinstance(error, FileNotFoundError):
                raise StoreError(f"no object {key} in {self.url}: run the stage that writes it") from error
            raise StoreError(f"cannot {what} {key} in {self.url}: {one_line(error)}") from error

    def _probe(self) -> None:
        with self._temporary() as (probe, file):
            file.write(b"probe")
            file.flush()
            os.fsync(file.fileno())
            target = probe.with_suffix(".link")
            try:
                os.link(probe, target)
            except OSError as error:
                raise StoreError(
                    f"the store {self.url} cannot hard-link files ({one_line(error)}), so objects could be "
                    "overwritten: use a folder on another file system"
                ) from error
            try:
                os.link(probe, target)
            except FileExistsError:
                return
            finally:
                target.unlink(missing_ok=True)
        raise StoreError(f"the store {self.url} links over existing files: use a folder on another file system")

    def _sweep(self) -> None:
        """Remove what killed processes left behind."""
        for path in (self.root / _TEMPORARY).iterdir():
            try:
                if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                    path.unlink()
            except FileNotFoundError:  # another process swept first
                continue


def _entries(folder: Path) -> list[tuple[str, Path]]:
    if not folder.is_dir():
        return []
    # A symbolic link was not made by a store, and it may lead out of it or into a loop.
    return [(path.name, path) for path in folder.iterdir() if is_key(path.name) and not path.is_symlink()]


def _keys(folder: Path, segments: tuple[str, ...]) -> Iterator[str]:
    for name, path in _entries(folder):
        if path.is_dir():
            yield from _keys(path, (*segments, name))
        elif path.is_file():
            yield "/".join((*segments, name))


def _make_folder(folder: Path) -> None:
    """mkdir -p that survives a power cut."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _fsync_folder(folder.parent)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
