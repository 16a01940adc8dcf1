"""Objects in S3 as files: a writer that publishes in the end, a reader of ranges."""

from __future__ import annotations

import io
import time
import uuid
from concurrent.futures import Future, ThreadPoolExecutor

from lrpq.errors import StoreError
from tasks.store.s3_client import AlreadyThere, AskedToRepeat, Missing, S3Client

PART_BYTES = 32 * 1024 * 1024
"""Objects up to this size are one PUT. Parts are equal (some servers insist), at most 10,000: 320 GB."""
CLAIM_SECONDS = 60.0
"""How long the holder of a claim may take to put its parts together before another one takes over."""
_POLL_SECONDS = 0.25


class Upload(io.RawIOBase):
    """Collects a part while the one before it is sent, so it holds two; a longer object becomes a multipart upload.

    Completing a multipart upload with ``If-None-Match`` is not atomic everywhere: on SeaweedFS 4.48 up to 8 of 8
    racers won in half of the rounds, while a plain conditional PUT had one winner in 81 of 81. So racers first put a
    small claim; who has it completes, the others wait for the object. A claim left by a dead process is taken over.
    """

    def __init__(self, client: S3Client, key: str) -> None:
        self._client = client
        self._key = key
        self._claim = f"~claims/{key}"  # no valid key contains "~": listings leave it out
        self._pending = bytearray()
        self._num_bytes = 0
        self._upload_id: str | None = None
        self._parts: list[dict[str, object]] = []
        self._sender: ThreadPoolExecutor | None = None
        self._sending: Future[dict[str, object]] | None = None

    def writable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Bytes written so far."""
        return self._num_bytes

    def write(self, data: bytes | bytearray | memoryview) -> int:  # type: ignore[override]
        """Take all of ``data``."""
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
            return self._client.put(self._key, bytes(self._pending))
        self._send_part()
        self._wait_for_part()
        token = uuid.uuid4().hex.encode()  # tells our claim from another's where the answer to it was lost
        if not self._client.put(self._claim, token) and self._client.content(self._claim) != token and self._appears():
            return False
        try:
            # Somebody may have published and dropped the claim between our first look and our claim.
            return self._client.size(self._key) is None and self._complete_parts(self._upload_id)
        finally:
            self._client.call_quietly("delete_object", self._claim)

    def abort(self) -> None:
        """Drop the parts of an upload that was not published."""
        if self._sender is not None:
            self._sender.shutdown(wait=True, cancel_futures=True)
            self._sender = None
        if self._upload_id is not None:
            self._client.call_quietly("abort_multipart_upload", self._key, UploadId=self._upload_id)
            self._upload_id = None

    def _appears(self) -> bool:
        deadline = time.monotonic() + CLAIM_SECONDS
        while time.monotonic() < deadline:
            if self._client.size(self._key) is not None:
                return True
            time.sleep(_POLL_SECONDS)
        return False

    def _complete_parts(self, upload_id: str) -> bool:
        parts = {"Parts": self._parts}
        try:
            self._client.call(
                "complete_multipart_upload",
                self._key,
                UploadId=upload_id,
                MultipartUpload=parts,
                IfNoneMatch="*",
            )
        except AlreadyThere:
            return False
        except Missing as error:  # the upload: completed by a request whose answer was lost, or forgotten by the server
            if self._client.size(self._key) is not None:
                return False
            raise AskedToRepeat(str(error)) from error
        self._upload_id = None
        return True

    def _send_part(self) -> None:
        if self._upload_id is None:
            self._upload_id = str(self._client.call("create_multipart_upload", self._key)["UploadId"])
            self._sender = ThreadPoolExecutor(max_workers=1)
        self._wait_for_part()
        assert self._sender is not None
        content = bytes(self._pending)
        self._pending.clear()
        self._sending = self._sender.submit(self._sent, self._upload_id, len(self._parts) + 1, content)

    def _wait_for_part(self) -> None:
        if self._sending is not None:
            self._parts.append(self._sending.result())
            self._sending = None

    def _sent(self, upload_id: str, number: int, content: bytes) -> dict[str, object]:
        options = {"UploadId": upload_id, "PartNumber": number, "Body": content}
        try:
            answer = self._client.call("upload_part", self._key, **options)
        except Missing as error:  # a server that was ended may have forgotten the upload
            raise AskedToRepeat(str(error)) from error
        return {"PartNumber": number, "ETag": answer["ETag"]}


class Ranges(io.RawIOBase):
    """An object of known size; every read is one range request."""

    def __init__(self, client: S3Client, key: str, size: int) -> None:
        self._client = client
        self._key = key
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move; also beyond the end, where reads give nothing."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise OSError("seek before the start")
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        """Where the next read starts."""
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill the buffer as far as the object goes."""
        content = self._take(self._position + len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def readall(self) -> bytes:
        """The rest in one request; the inherited one would ask for 8 kB at a time."""
        return self._take(self._size)

    def _take(self, end: int) -> bytes:
        start, end = self._position, min(end, self._size)
        if end <= start:
            return b""
        content = self._client.read(self._key, start, end)
        if len(content) != end - start:
            raise StoreError(f"{self._key} in {self._client.url} changed while it was read: run again")
        self._position = end
        return content
