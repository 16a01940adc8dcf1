"""A store in an S3 bucket: published by conditional PUT (``If-None-Match: *``), large objects in parts."""

from __future__ import annotations

import asyncio
import io
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, BinaryIO, cast

import fsspec

from lrpq.errors import StoreError
from tasks.store.objects import check_key, is_key, one_line

PART_BYTES = 64 * 1024 * 1024
"""Objects up to this size are one PUT. Parts are equal (some servers insist), at most 10,000: 640 GB."""
_READ_AHEAD_BYTES = 1024 * 1024
_ATTEMPTS = 3  # of the HTTP request, and of a publication that the server asks to repeat
_TIMEOUTS = {"connect_timeout": 5, "read_timeout": 60}  # seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Store:
    """Objects below ``s3://bucket/prefix``."""

    bucket: str
    prefix: str
    """Without slashes at its ends; may be empty."""
    url: str
    """As the user gave it."""
    files: Any
    """The s3fs file system that holds the connections."""

    @classmethod
    def open_tested(cls, bucket: str, prefix: str, *, url: str) -> S3Store:
        """Connect and test that of two conditional PUTs the second is refused.

        Raises:
            StoreError: not reachable, not allowed, or the server ignores the condition.
        """
        retries = {"max_attempts": _ATTEMPTS, "mode": "standard"}
        files = fsspec.filesystem(
            "s3",
            config_kwargs={**_TIMEOUTS, "retries": retries},
            use_listings_cache=False,
            skip_instance_cache=True,  # a cached one would keep the credentials of an earlier environment
        )
        files.retries = 1  # on top of botocore's own
        store = cls(bucket=bucket, prefix=prefix, url=url, files=files)
        probe = f"~probe-{uuid.uuid4().hex}"  # no valid key contains "~": listings leave it out
        try:
            won = store._put(probe, b"probe")
            kept = not store._put(probe, b"other")
        except StoreError as error:
            raise StoreError(
                f"cannot write to the store {url}: {_reason(error.__cause__ or error)}; "
                "check bucket, endpoint and credentials in the environment"
            ) from error
        store._call_quietly("delete_object", probe)
        if not won:
            raise StoreError(f"the store {url} answers 412 to a PUT of a new object: use another S3 server")
        if not kept:
            raise StoreError(
                f"the store {url} ignores 'If-None-Match: *' (a second conditional PUT was not answered "
                "412), so objects could be overwritten: use a server with conditional writes"
            )
        return store

    def exists(self, key: str) -> bool:
        """Whether the object has been published."""
        return self._size(key) is not None

    def publish(self, key: str, write: Callable[[BinaryIO], None]) -> bool:
        """See ObjectStore. Holds at most one part of ``PART_BYTES`` in memory."""
        if self.exists(key):
            return False
        for _ in range(_ATTEMPTS):
            upload = _Upload(self, key)
            try:
                write(cast(BinaryIO, upload))
                return upload.complete()
            except _AskedToRepeat:
                continue
            finally:
                upload.abort()
        raise StoreError(
            f"cannot write {key} to {self.url}: conflicting requests {_ATTEMPTS} times; run again"
        )

    def open(self, key: str) -> BinaryIO:
        """The object, seekable; one range request per read of more than a megabyte."""
        return cast(BinaryIO, io.BufferedReader(_Ranges(self, key, self.size(key)), _READ_AHEAD_BYTES))

    def list(self, prefix: str = "") -> Iterator[str]:
        """Keys of all objects below the folder ``prefix``, sorted."""
        base = self._folder(prefix)
        for page in self._pages(prefix, Prefix=base):
            for item in page.get("Contents", ()):
                key = item["Key"][len(self._folder("")) :]
                if is_key(key):
                    yield key

    def folders(self, prefix: str = "") -> Iterator[str]:
        """Names of the folders directly below ``prefix``, sorted."""
        base = self._folder(prefix)
        for page in self._pages(prefix, Prefix=base, Delimiter="/"):
            for item in page.get("CommonPrefixes", ()):
                name = item["Prefix"][len(base) :].rstrip("/")
                if is_key(name):
                    yield name

    def size(self, key: str) -> int:
        """Length in bytes."""
        size = self._size(key)
        if size is None:
            raise StoreError(f"no object {key} in {self.url}: run the stage that writes it")
        return size

    def delete(self, key: str) -> None:
        """Remove the object; no error if there is none."""
        check_key(key)
        self._call("delete_object", key)

    def _name(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    def _folder(self, prefix: str) -> str:
        parts = [*check_key(self.prefix, folder=True), *check_key(prefix, folder=True)]
        return "".join(part + "/" for part in parts)

    def _size(self, key: str) -> int | None:
        check_key(key)
        try:
            return int(self._call("head_object", key)["ContentLength"])
        except _Missing:
            return None

    def _put(self, key: str, content: bytes) -> bool:
        try:
            self._call("put_object", key, Body=content, IfNoneMatch="*")
        except _AlreadyThere:
            return False
        return True

    def _pages(self, shown: str, **options: str) -> Iterator[dict[str, Any]]:
        token: dict[str, str] = {}
        while True:
            with self._reporting("list_objects_v2", shown or "the store"):
                page = self.files.call_s3("list_objects_v2", Bucket=self.bucket, **options, **token)
            yield page
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def _call(self, method: str, key: str, **options: object) -> dict[str, Any]:
        name = self._name(key)
        with self._reporting(method, key):
            return cast(
                "dict[str, Any]", self.files.call_s3(method, Bucket=self.bucket, Key=name, **options) or {}
            )

    def _call_quietly(self, method: str, key: str, **options: object) -> None:
        """For tidying up after another error, which must be the one that is seen."""
        try:
            self._call(method, key, **options)
        except StoreError:
            return

    @contextmanager
    def _reporting(self, method: str, key: str) -> Iterator[None]:
        botocore, aiohttp = import_module("botocore.exceptions"), import_module("aiohttp")
        network = (
            OSError,
            botocore.BotoCoreError,
            botocore.ClientError,
            aiohttp.ClientError,
            asyncio.TimeoutError,
        )
        try:
            yield
        except network as error:
            answer = _answer(error)
            code, status = _code(error), answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
            message = f"{method} of {key} in {self.url} failed: {_reason(error)}"
            if status == 412:
                raise _AlreadyThere(message) from error
            if status == 409 and code == "ConditionalRequestConflict":
                raise _AskedToRepeat(message) from error
            if status == 404 and code != "NoSuchBucket":
                raise _Missing(message) from error
            raise StoreError(message) from error


def _answer(error: BaseException) -> dict[str, Any]:
    # s3fs turns botocore's ClientError into an OSError with the ClientError as its cause.
    found = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    return found if isinstance(found, dict) else {}


def _code(error: BaseException) -> str:
    return str(_answer(error).get("Error", {}).get("Code", ""))


def _reason(error: BaseException) -> str:
    return f"{_code(error) or type(error).__name__}: {one_line(error)}"


class _AlreadyThere(StoreError):
    """412: the condition of a conditional PUT does not hold."""


class _AskedToRepeat(StoreError):
    """409: a conflicting request was under way; S3 asks to upload again."""


class _Missing(StoreError):
    """404."""


class _Upload(io.RawIOBase):
    """Collects one part at a time; decides between one PUT and a multipart upload by the length."""

    def __init__(self, store: S3Store, key: str) -> None:
        self._store = store
        self._key = key
        self._pending = bytearray()
        self._num_bytes = 0
        self._upload_id: str | None = None
        self._parts: list[dict[str, object]] = []

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._num_bytes

    def write(self, data: bytes | bytearray | memoryview) -> int:  # type: ignore[override]
        view = memoryview(data).cast("B")
        taken = 0
        while taken < len(view):
            if len(self._pending) == PART_BYTES:
                self._send_part()
            piece = view[taken : taken + PART_BYTES - len(self._pending)]
            self._pending += piece
            taken += len(piece)
        self._num_bytes += taken
        return taken

    def complete(self) -> bool:
        """Publish; False if another object was published first."""
        if self._upload_id is None:
            return self._store._put(self._key, bytes(self._pending))
        self._send_part()
        parts = {"Parts": self._parts}
        try:
            self._store._call(
                "complete_multipart_upload",
                self._key,
                UploadId=self._upload_id,
                MultipartUpload=parts,
                IfNoneMatch="*",
            )
        except _AlreadyThere:
            return False
        self._upload_id = None
        return True

    def abort(self) -> None:
        """Drop the parts of an upload that was not published."""
        if self._upload_id is not None:
            self._store._call_quietly("abort_multipart_upload", self._key, UploadId=self._upload_id)
            self._upload_id = None

    def _send_part(self) -> None:
        if self._upload_id is None:
            self._upload_id = str(self._store._call("create_multipart_upload", self._key)["UploadId"])
        number = len(self._parts) + 1
        answer = self._store._call(
            "upload_part", self._key, UploadId=self._upload_id, PartNumber=number, Body=bytes(self._pending)
        )
        self._parts.append({"PartNumber": number, "ETag": answer["ETag"]})
        self._pending.clear()


class _Ranges(io.RawIOBase):
    """An object as a file: every read is one range request."""

    def __init__(self, store: S3Store, key: str, size: int) -> None:
        self._store = store
        self._key = key
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise OSError("seek before the start")
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        end = min(self._position + len(buffer), self._size)
        if end <= self._position:
            return 0
        path = f"{self._store.bucket}/{self._store._name(self._key)}"
        with self._store._reporting("get_object", self._key):
            content = self._store.files.cat_file(path, start=self._position, end=end)
        if len(content) != end - self._position:
            raise StoreError(f"{self._key} in {self._store.url} ended early: it changed while it was read")
        buffer[: len(content)] = content
        self._position = end
        return len(content)
