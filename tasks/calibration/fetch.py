"""Bytes and text from a local file or a URL, with limits on size and time.

http and https go through urllib, every other protocol (s3, gs, memory, ...) through fsspec.
"""

from __future__ import annotations

import io
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import aiohttp
import fsspec

from lrpq.errors import CalibrationError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

MIB = 1 << 20
MAX_DOWNLOAD_BYTES = 1024 * MIB  # more than any calibration needs: a mistaken URL, not a text
SOCKET_TIMEOUT_SECONDS = 20.0
TOTAL_TIMEOUT_SECONDS = 600.0  # a server that trickles never trips the socket timeout
PIECE_CHARS = 4 * MIB


def text_pieces(location: str, *, piece_chars: int | None = PIECE_CHARS) -> Iterator[str]:
    """Yield the text in pieces of about ``piece_chars`` characters, cut behind a newline; None is one piece.

    Line ends are normalised to a single newline, as ``Path.read_text`` does.

    Raises:
        CalibrationError: unreadable, too large, too slow, or not UTF-8.
    """
    with open_bytes(location) as stream, _decoding(location):
        with io.TextIOWrapper(stream, encoding="utf-8") as lines:
            while piece := lines.read(-1 if piece_chars is None else piece_chars):
                yield piece + lines.readline()


def text_lines(location: str) -> Iterator[str]:
    """Yield the lines of a UTF-8 text; raises as ``text_pieces``."""
    with open_bytes(location) as stream, _decoding(location):
        with io.TextIOWrapper(stream, encoding="utf-8") as lines:
            yield from lines


@contextmanager
def open_bytes(location: str) -> Iterator[BinaryIO]:
    """Open a file or URL for reading from its beginning to its end."""
    with translated(location):
        if is_http(location):
            with _open_http(location) as stream:
                yield stream
        elif "://" in location:
            with fsspec.open(location, "rb") as stream:
                yield cast(BinaryIO, stream)
        else:
            with open(location, "rb") as stream:
                yield stream


@contextmanager
def open_seekable(location: str) -> Iterator[BinaryIO]:
    """Open a file or URL for random access: by range requests where the server has them, else downloaded."""
    if not is_http(location):
        with open_bytes(location) as stream:
            yield stream
        return
    with translated(location):
        timeout = aiohttp.ClientTimeout(total=TOTAL_TIMEOUT_SECONDS, sock_read=SOCKET_TIMEOUT_SECONDS)
        files = fsspec.filesystem("http", client_kwargs={"timeout": timeout})
        if files.info(location).get("partial"):
            with files.open(location, "rb", block_size=MIB) as remote:
                yield cast(BinaryIO, remote)
            return
    with tempfile.TemporaryFile() as copy:
        with open_bytes(location) as stream:
            while chunk := stream.read(MIB):
                copy.write(chunk)
        copy.seek(0)
        yield cast(BinaryIO, copy)


def is_http(location: str) -> bool:
    """Whether the location is an http or https URL."""
    return location.lower().startswith(("http://", "https://"))


@contextmanager
def translated(location: str) -> Iterator[None]:
    """Turn the errors of the operating system and of transports into one CalibrationError."""
    try:
        yield
    except (OSError, HTTPException, aiohttp.ClientError) as error:
        raise CalibrationError(
            f"{location}: cannot be read ({_reason(error)}); check the name, or save it as a local file"
        ) from error
    except (ValueError, ImportError) as error:
        if "://" not in location or isinstance(error, UnicodeDecodeError):
            raise
        raise CalibrationError(f"{location}: cannot be opened ({_reason(error)})") from error


@contextmanager
def _decoding(location: str) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise CalibrationError(
            f"{location}: not UTF-8 text (byte 0x{byte:02x}); convert it, or name its kind (parquet:, hub:)"
        ) from error


def _reason(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


@contextmanager
def _open_http(url: str) -> Iterator[BinaryIO]:
    request = urllib.request.Request(url, headers={"User-Agent": "lrpq"})  # noqa: S310 -- http(s) only, see is_http
    with urllib.request.urlopen(request, timeout=SOCKET_TIMEOUT_SECONDS) as response:  # noqa: S310
        yield cast(BinaryIO, io.BufferedReader(_Limited(response, url), MIB))


class _Limited(io.RawIOBase):
    """A response that fails once it is larger or slower than the limits."""

    def __init__(self, response: Any, url: str) -> None:
        self._response = response
        self._url = url
        self._num_bytes = 0
        self._deadline = time.monotonic() + TOTAL_TIMEOUT_SECONDS

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        count: int = self._response.readinto(buffer)
        self._num_bytes += count
        if self._num_bytes > MAX_DOWNLOAD_BYTES:
            raise CalibrationError(
                f"{self._url}: larger than {MAX_DOWNLOAD_BYTES // MIB} MiB; save a part of it as a local file"
            )
        if time.monotonic() > self._deadline:
            raise CalibrationError(
                f"{self._url}: not read within {TOTAL_TIMEOUT_SECONDS:.0f} s; save it as a local file"
            )
        return count
