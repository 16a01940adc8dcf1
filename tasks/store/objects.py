"""A store holds objects under keys: written once, whole or not at all, never changed.

A key is a relative POSIX path such as ``run-1/hessians/3f9a.parquet``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol
from urllib.parse import unquote, urlsplit

from lrpq.errors import ConfigError, StoreError

_SEGMENT = re.compile(r"[A-Za-z0-9._=-]{1,255}\Z")
_MAX_KEY = 900  # S3 allows 1024 bytes, the store's own prefix included
_MAX_PREFIX = 120
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]\Z")
_CHUNK_BYTES = 4 * 1024 * 1024


class ObjectStore(Protocol):
    """Where objects live. All methods raise StoreError, with one line; all of them validate the key."""

    @property
    def url(self) -> str:
        """The URL the store was opened with, for messages and for opening it in another process."""
        ...

    def exists(self, key: str) -> bool:
        """Whether the object has been published."""
        ...

    def publish(self, key: str, write: Callable[[BinaryIO], None]) -> bool:
        """Call ``write`` with a file and publish what it wrote.

        Returns True if these bytes are the object now, False if another one was published first: then these
        bytes are gone. Readers see the whole object or none. ``write`` may be called not at all (the object
        exists) or more than once (the server asks to repeat), so it must always write the same.
        """
        ...

    def open(self, key: str) -> BinaryIO:
        """The object, seekable; the caller closes it."""
        ...

    def list(self, prefix: str = "") -> Iterator[str]:
        """Keys of all objects below the folder ``prefix`` (the whole store by default), sorted."""
        ...

    def folders(self, prefix: str = "") -> Iterator[str]:
        """Names of the folders directly below the folder ``prefix``, sorted."""
        ...

    def size(self, key: str) -> int:
        """Length of the object in bytes."""
        ...

    def delete(self, key: str) -> None:
        """Remove the object; no error if there is none."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectRecord:
    """What a manifest says about one object."""

    num_bytes: int
    """Length in bytes."""
    sha256: str
    """SHA-256 of the stored bytes, hexadecimal."""


def open_store(url: str) -> ObjectStore:
    """Open a store and test that it keeps its promises.

    ``url`` is a folder (``runs``, ``/data/runs``, ``file:///data/runs``), created if absent, or
    ``s3://bucket/prefix``. S3 takes credentials, region and endpoint from the environment
    (``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``, ...).

    Raises:
        ConfigError: an unknown kind of URL, or S3 without s3fs installed.
        StoreError: not writable, no hard links (folder) or no conditional PUT (S3).
    """
    from tasks.store.local import LocalStore
    from tasks.store.s3 import S3Store

    scheme, separator, _ = url.partition("://")
    if not url or "\0" in url:
        raise ConfigError(f"the store URL {url!r} is empty or not a path: give a folder or s3://bucket/prefix")
    if not separator:
        return LocalStore.open_tested(Path(url), url=url)
    if scheme == "file":
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost") or not parts.path or parts.query or parts.fragment:
            raise ConfigError(f"the store URL {url!r} is not a local folder: expected file:///absolute/path")
        return LocalStore.open_tested(Path(unquote(parts.path)), url=url)
    if scheme == "s3":
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        prefix = prefix.rstrip("/")
        if not _BUCKET.match(bucket) or len(prefix) > _MAX_PREFIX:
            raise ConfigError(f"the store URL {url!r} is not valid: expected s3://bucket/prefix, a short prefix")
        try:
            check_key(prefix, folder=True)
        except StoreError as error:
            raise ConfigError(f"the store URL {url!r} is not valid: {error}") from None
        if importlib.util.find_spec("s3fs") is None:
            raise ConfigError(f"the store {url} needs the package s3fs: install lrpq[s3]")
        return S3Store.open_tested(bucket, prefix, url=url)
    raise ConfigError(f"the store URL {url!r} has an unknown scheme: give a folder, file:// or s3://bucket/prefix")


def check_key(key: str, *, folder: bool = False) -> tuple[str, ...]:
    """The segments of a key; this is the only place that decides what a key may look like.

    A ``folder`` may also be empty (the store itself). Everything outside of ``[A-Za-z0-9._=-]`` is refused,
    hence also backslashes and control characters, and so are absolute paths, empty segments, ``.`` and
    ``..``.

    Raises:
        StoreError: not a valid key.
    """
    if folder and key == "":
        return ()
    segments = tuple(key.split("/"))
    if len(key) > _MAX_KEY or any(not _SEGMENT.match(part) or part in (".", "..") for part in segments):
        shown = key if len(key) <= 80 else key[:77] + "..."
        raise StoreError(
            f"{shown!r} is not a valid key: expected a relative path of A-Z a-z 0-9 . _ = - and /, "
            f"without '..', at most {_MAX_KEY} characters"
        )
    return segments


def is_key(key: str) -> bool:
    """Whether ``check_key`` takes it: listings leave out what no store wrote."""
    try:
        check_key(key)
    except StoreError:
        return False
    return True


def record_of(store: ObjectStore, key: str) -> ObjectRecord:
    """Length and checksum of a stored object; reads all of it."""
    digest, num_bytes = hashlib.sha256(), 0
    try:
        with store.open(key) as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                num_bytes += len(chunk)
    except OSError as error:
        raise StoreError(f"cannot read {key} in {store.url}: {one_line(error)}") from error
    return ObjectRecord(num_bytes=num_bytes, sha256=digest.hexdigest())


def one_line(error: BaseException) -> str:
    """An error's message without line breaks."""
    text = " ".join(str(error).split())
    return text or type(error).__name__
