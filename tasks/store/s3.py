"""A store in an S3 bucket: published by conditional PUT (``If-None-Match: *``), large objects in parts."""

from __future__ import annotations

import io
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO, cast

from lrpq.errors import StoreError
from tasks.store import s3_client
from tasks.store.objects import check_key, is_key
from tasks.store.s3_client import ATTEMPTS, AskedToRepeat, S3Client, advice_for, reason_of
from tasks.store.s3_files import Ranges, Upload

_PROBE_READ_SECONDS = 7.0
"""Three attempts at a server that takes connections and never answers end within half a minute."""
_READ_AHEAD_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Store:
    """Objects below ``s3://bucket/prefix``."""

    client: S3Client
    """Where the requests go."""

    @classmethod
    def open_tested(cls, bucket: str, prefix: str, *, url: str) -> S3Store:
        """Connect and test that of two conditional PUTs the second is refused.

        Raises:
            StoreError: not reachable, not allowed, or the server ignores the condition.
        """
        client = S3Client.connect(bucket, prefix, url=url, read_seconds=_PROBE_READ_SECONDS)
        probe = f"~probe-{uuid.uuid4().hex}"  # no valid key contains "~": listings leave it out
        try:
            won = client.put(probe, b"probe")
            kept = not client.put(probe, b"other")
        except StoreError as error:
            raise StoreError(
                f"cannot write to the store {url}: {reason_of(error.__cause__ or error)}; "
                f"{advice_for(error.__cause__ or error)}"
            ) from error
        client.call_quietly("delete_object", probe)
        if not won:
            raise StoreError(f"the store {url} answers 412 to a PUT of a new object: use another S3 server")
        if not kept:
            raise StoreError(
                f"the store {url} ignores 'If-None-Match: *' (a second conditional PUT was not answered "
                "412), so objects could be overwritten: use a server with conditional writes"
            )
        return cls(client=replace(S3Client.connect(bucket, prefix, url=url), patience=s3_client.PATIENCE_SECONDS))

    @property
    def url(self) -> str:
        """As the user gave it."""
        return self.client.url

    def exists(self, key: str) -> bool:
        """Whether the object has been published."""
        check_key(key)
        return self.client.size(key) is not None

    def publish(self, key: str, write: Callable[[BinaryIO], None]) -> bool:
        """See ObjectStore. Holds at most two parts in memory."""
        if self.exists(key):
            return False
        for _ in range(ATTEMPTS):
            upload = Upload(self.client, key)
            try:
                write(cast(BinaryIO, upload))
                return upload.complete()
            except AskedToRepeat:
                continue
            finally:
                upload.abort()
        raise StoreError(f"cannot write {key} in {self.url}: conflicting requests {ATTEMPTS} times; run again")

    def open(self, key: str) -> BinaryIO:
        """The object, seekable; one range request per read of more than a megabyte."""
        return cast(BinaryIO, io.BufferedReader(Ranges(self.client, key, self.size(key)), _READ_AHEAD_BYTES))

    def list(self, prefix: str = "") -> Iterator[str]:
        """Keys of all objects below the folder ``prefix``, sorted."""
        folder = _folder(prefix)
        found = [folder + name for names, _ in self.client.pages(folder) for name in names]
        yield from sorted(key for key in found if is_key(key))  # SeaweedFS sorts "a/" before "a-b/", S3 after it

    def folders(self, prefix: str = "") -> Iterator[str]:
        """Names of the folders directly below ``prefix``, sorted."""
        pages = self.client.pages(_folder(prefix), Delimiter="/")
        found = [name.rstrip("/") for _, names in pages for name in names]
        yield from sorted(name for name in found if is_key(name))

    def size(self, key: str) -> int:
        """Length in bytes."""
        check_key(key)
        size = self.client.size(key)
        if size is None:
            raise StoreError(f"no object {key} in {self.url}: run the stage that writes it")
        return size

    def delete(self, key: str) -> None:
        """Remove the object; no error if there is none."""
        check_key(key)
        self.client.call("delete_object", key)


def _folder(prefix: str) -> str:
    return "".join(part + "/" for part in check_key(prefix, folder=True))
