"""Requests to S3: one place where names are built and where errors become one line."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import import_module
from typing import Any, cast

import fsspec

from lrpq.errors import StoreError
from tasks.store.objects import one_line

ATTEMPTS = 3
"""Of an HTTP request, and of a publication that the server asks to repeat."""
_TIMEOUTS = {"connect_timeout": 5, "read_timeout": 60}  # seconds


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

    @classmethod
    def connect(cls, bucket: str, prefix: str, *, url: str) -> S3Client:
        """With credentials, region and endpoint of the environment; makes no request."""
        files = fsspec.filesystem(
            "s3",
            config_kwargs={**_TIMEOUTS, "retries": {"max_attempts": ATTEMPTS, "mode": "standard"}},
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
        with self._reporting(method, key):
            answer = self.files.call_s3(method, Bucket=self.bucket, Key=self._name(key), **options)
            return cast("dict[str, Any]", answer or {})

    def call_quietly(self, method: str, key: str, **options: object) -> None:
        """For tidying up: what it leaves behind is harmless, and an earlier error must be the one that is seen."""
        try:
            self.call(method, key, **options)
        except StoreError:
            return

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
        with self._reporting("get_object", key):
            return cast(bytes, self.files.cat_file(f"{self.bucket}/{self._name(key)}", start=start, end=end))

    def pages(self, folder: str, **options: str) -> Iterator[tuple[list[str], list[str]]]:
        """Names below a folder (ending in a slash or empty), from there on: of objects, of common prefixes."""
        base = self._name(folder)
        token: dict[str, str] = {}
        while True:
            with self._reporting("list_objects_v2", folder or "the store"):
                page = self.files.call_s3("list_objects_v2", Bucket=self.bucket, Prefix=base, **options, **token)
            objects = [item["Key"][len(base) :] for item in page.get("Contents", ())]
            yield objects, [item["Prefix"][len(base) :] for item in page.get("CommonPrefixes", ())]
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

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
            raise StoreError(message) from error


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
