"""Requests to S3: one place where names are built, errors become one line and a server that is away is waited for."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from typing import Any, TypeVar, cast

import fsspec

from lrpq.errors import StoreError
from tasks.store.objects import one_line

ATTEMPTS = 3
"""Of an HTTP request, and of a publication that the server asks to repeat."""
CONNECT_SECONDS = 5.0
READ_SECONDS = 60.0
"""Without a byte of an answer; a server may need long to put the parts of a large object together."""


PATIENCE_SECONDS = 120.0
"""How long a server that has answered before may be away: a restart, a failover, a router."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 10.0  # seconds between two requests to a server that is away; they double
T = TypeVar("T")
_ADVICE = {
    "ExpiredToken": "get new credentials",
    "ExpiredTokenException": "get new credentials",
    "TokenRefreshRequired": "get new credentials",
    "RequestTimeTooSkewed": "set this machine's clock",
    "NoSuchBucket": "create the bucket, or correct its name",
    "AccessDenied": "these credentials need to read, write, list and delete below the prefix",
}


class Unreachable(StoreError):
    """No answer, or one that says that the server cannot answer now (5xx, 429)."""


class AlreadyThere(StoreError):
    """412: the condition of a conditional PUT does not hold."""


class AskedToRepeat(StoreError):
    """409: a conflicting request was under way; S3 asks to upload again."""


class Missing(StoreError):
    """404."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """What a listing says of an object, or of an upload that is not complete."""

    name: str
    """Below the prefix."""
    num_bytes: int
    age_seconds: float
    upload_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Client:
    """Blocking requests below ``s3://bucket/prefix``; safe for several threads."""

    bucket: str
    prefix: str
    """Without slashes at its ends; may be empty."""
    url: str
    """For messages."""
    files: Any
    """The s3fs file system that holds the connections."""
    patience: float = 0.0
    """Seconds for which a request is repeated while the server is away; 0 until it has answered once."""

    @classmethod
    def connect(cls, bucket: str, prefix: str, *, url: str, read_seconds: float = READ_SECONDS) -> S3Client:
        """With credentials, region and endpoint of the environment; makes no request."""
        timeouts = {"connect_timeout": CONNECT_SECONDS, "read_timeout": read_seconds}
        files = fsspec.filesystem(
            "s3",
            config_kwargs={**timeouts, "retries": {"total_max_attempts": ATTEMPTS, "mode": "standard"}},
            use_listings_cache=False,
            skip_instance_cache=True,  # a cached one would keep the credentials of an earlier environment
        )
        files.retries = 1  # botocore's own are enough
        return cls(bucket=bucket, prefix=prefix, url=url, files=files)

    def call(self, method: str, key: str, **options: object) -> dict[str, Any]:
        """One request about one object.

        Raises:
            AlreadyThere, AskedToRepeat, Missing: 412, 409, 404.
            StoreError: any other error.
        """

        def request() -> dict[str, Any]:
            with self._reporting(method, key):
                answer = self.files.call_s3(method, Bucket=self.bucket, Key=self._name(key), **options)
                return cast("dict[str, Any]", answer or {})

        return self._patiently(request)

    def call_quietly(self, method: str, key: str, **options: object) -> None:
        """For tidying up: what it leaves behind is harmless, and an earlier error must be the one that is seen."""
        with suppress(StoreError):
            replace(self, patience=0.0).call(method, key, **options)

    def put(self, key: str, content: bytes) -> bool:
        """PUT if there is no such object; False if there is."""
        try:
            self.call("put_object", key, Body=content, IfNoneMatch="*")
        except AlreadyThere:
            return False
        return True

    def size(self, key: str) -> int | None:
        """Length in bytes; None if there is no such object."""
        try:
            return int(self.call("head_object", key)["ContentLength"])
        except Missing:
            return None

    def read(self, key: str, start: int, end: int) -> bytes:
        """Bytes ``start`` to ``end`` of an object."""

        def request() -> bytes:
            with self._reporting("get_object", key):
                return cast(bytes, self.files.cat_file(f"{self.bucket}/{self._name(key)}", start=start, end=end))

        return self._patiently(request)

    def content(self, key: str) -> bytes | None:
        """A small object; None if there is none."""
        try:
            size = self.size(key)
            return None if size is None else self.read(key, 0, size) if size else b""
        except Missing:  # deleted meanwhile
            return None

    def pages(self, folder: str, **options: str) -> Iterator[tuple[list[str], list[str]]]:
        """Names below a folder (ending in a slash or empty), from there on: of objects, of common prefixes."""
        base = self._name(folder)
        token: dict[str, str] = {}
        while True:
            page = self._patiently(partial(self._page, folder, base, {**options, **token}))
            objects = [item["Key"][len(base) :] for item in page.get("Contents", ())]
            yield objects, [item["Prefix"][len(base) :] for item in page.get("CommonPrefixes", ())]
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def _page(self, folder: str, base: str, options: Mapping[str, str]) -> dict[str, Any]:
        with self._reporting("list_objects_v2", folder or "the store"):
            answer = self.files.call_s3("list_objects_v2", Bucket=self.bucket, Prefix=base, **options)
            return cast("dict[str, Any]", answer)

    def _patiently(self, request: Callable[[], T]) -> T:
        """Repeat a request while the server is away.

        A request that was carried out and whose answer was lost is carried out twice. A conditional PUT then finds its
        own object: that reads as another writer's, whose bytes are the same.
        """
        deadline, pause = time.monotonic() + self.patience, _FIRST_PAUSE
        while True:
            try:
                return request()
            except Unreachable:
                if time.monotonic() + pause > deadline:
                    raise
            time.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 -- so that many workers do not come back at once
            pause = min(2 * pause, _LONGEST_PAUSE)

    def listed(self) -> Iterator[Listed]:
        """Everything below the prefix, also what is no object of the store."""
        base, token = self._name(""), dict[str, str]()
        while True:
            with self._reporting("list_objects_v2", "the store"):
                page = self.files.call_s3("list_objects_v2", Bucket=self.bucket, Prefix=base, **token)
            for item in page.get("Contents", ()):
                yield Listed(
                    name=item["Key"][len(base) :], num_bytes=int(item["Size"]), age_seconds=_age(item["LastModified"])
                )
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def unfinished_uploads(self) -> Iterator[Listed]:
        """Multipart uploads below the prefix that were neither completed nor aborted."""
        base, markers = self._name(""), dict[str, str]()
        while True:
            with self._reporting("list_multipart_uploads", "the store"):
                page = self.files.call_s3("list_multipart_uploads", Bucket=self.bucket, Prefix=base, **markers)
            for item in page.get("Uploads") or ():
                yield Listed(
                    name=item["Key"][len(base) :],
                    num_bytes=0,
                    age_seconds=_age(item["Initiated"]),
                    upload_id=item["UploadId"],
                )
            if not page.get("IsTruncated"):
                return
            markers = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def _name(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    @contextmanager
    def _reporting(self, method: str, key: str) -> Iterator[None]:
        # Loaded by s3fs, so by now they are there.
        botocore, aiohttp = import_module("botocore.exceptions"), import_module("aiohttp")
        own = (botocore.BotoCoreError, botocore.ClientError, aiohttp.ClientError, asyncio.TimeoutError)
        away = (
            *(botocore.ConnectionError, botocore.ConnectionClosedError, botocore.ReadTimeoutError),
            *(botocore.IncompleteReadError, botocore.ResponseStreamingError),
            *(aiohttp.ClientError, asyncio.TimeoutError, ConnectionError),
        )
        try:
            yield
        except (OSError, *own) as error:
            status = _answer(error).get("ResponseMetadata", {}).get("HTTPStatusCode")
            message = f"{method} of {key} in {self.url} failed: {reason_of(error)}"
            if status == 412:
                raise AlreadyThere(message) from error
            if status == 409 and _code(error) == "ConditionalRequestConflict":
                raise AskedToRepeat(message) from error
            if status == 404 and _code(error) != "NoSuchBucket":
                raise Missing(message) from error
            if isinstance(error, away) or isinstance(error.__cause__, away) or status == 429 or (status or 0) >= 500:
                raise Unreachable(message) from error
            raise StoreError(message) from error


def advice_for(error: BaseException) -> str:
    """What to do about an error of the first request."""
    return _ADVICE.get(_code(error), "check bucket, endpoint and credentials in the environment")


def _age(moment: datetime) -> float:
    """Seconds since a server's time, by this machine's clock."""
    return (datetime.now(UTC) - moment).total_seconds()


def reason_of(error: BaseException) -> str:
    """Code and message of an S3 or network error, one line."""
    return f"{_code(error) or type(error).__name__}: {one_line(error)}"


def _code(error: BaseException) -> str:
    return str(_answer(error).get("Error", {}).get("Code", ""))


def _answer(error: BaseException) -> dict[str, Any]:
    # s3fs turns botocore's ClientError into an OSError with the ClientError as its cause.
    found = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    return found if isinstance(found, dict) else {}
