"""What S3 refuses: one clear line within half a minute, no storm of requests, no secret in it.

The server is SeaweedFS; only where it cannot do what AWS does (credentials that expire) or must be counted does a small
one answer as AWS does.
"""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import botocore.auth
import pytest
from chaos.services import BUCKET, KEY, SECRET, S3Server

from lrpq.errors import StoreError
from tasks.store import s3_client
from tasks.store.objects import open_store

SECONDS = 30.0
URL = f"s3://{BUCKET}/x"


class Strict(S3Server):
    """A write to a bucket that is not there does not create it."""

    def command(self) -> list[str]:
        return [*super().command(), "-s3.autoCreateBucket=false"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    server = Strict(tmp_path_factory.mktemp("strict"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(autouse=True)
def credentials(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def refused(url: str = URL) -> str:
    """The one line; in time, without secrets, also in what it was raised from."""
    started = time.monotonic()
    with pytest.raises(StoreError) as caught:
        open_store(url)
    assert time.monotonic() - started < SECONDS
    message = str(caught.value)
    assert message.startswith(f"cannot write to the store {url}: ")
    assert "\n" not in message
    link: BaseException | None = caught.value
    while link is not None:
        assert SECRET not in f"{link!s} {link!r}"
        link = link.__cause__ or link.__context__
    return message


@contextmanager
def answering(status: int, body: str, headers: dict[str, str] | None = None) -> Iterator[list[str]]:
    """A server that always answers the same; yields its URL, then a line a request."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_PUT(self) -> None:
            requests.append(self.path)
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *values: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        requests.append(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield requests
        finally:
            server.shutdown()
            thread.join()


def error_body(code: str, message: str) -> str:
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message></Error>'


def test_a_good_store_opens() -> None:
    open_store(URL)


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("AWS_SECRET_ACCESS_KEY", "another-secret-do-not-print-71aa", "SignatureDoesNotMatch"),
        ("AWS_ACCESS_KEY_ID", "nobody", "InvalidAccessKeyId"),
        ("AWS_SESSION_TOKEN", "a-token-do-not-print-93bc", "InvalidAccessKeyId"),
    ],
)
def test_wrong_credentials(monkeypatch: pytest.MonkeyPatch, name: str, value: str, code: str) -> None:
    monkeypatch.setenv(name, value)
    message = refused()
    assert f": {code}: " in message
    assert message.endswith("; check bucket, endpoint and credentials in the environment")
    assert value not in message


def test_no_credentials_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "NoCredentialsError" in refused()


def test_a_missing_bucket_is_named() -> None:
    message = refused("s3://no-such-bucket/x")
    assert ": NoSuchBucket: " in message
    assert message.endswith("; create the bucket, or correct its name")


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_clock_that_is_off_by_an_hour(monkeypatch: pytest.MonkeyPatch, hours: int) -> None:
    now = botocore.auth.get_current_datetime
    off = datetime.timedelta(hours=hours)
    monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda **options: now(**options) + off)
    message = refused()
    assert ": RequestTimeTooSkewed: " in message
    assert message.endswith("; set this machine's clock")


@pytest.mark.parametrize(
    ("status", "code", "advice"),
    [
        (400, "ExpiredToken", "get new credentials"),
        (403, "AccessDenied", "these credentials need to read, write, list and delete below the prefix"),
    ],
)
def test_what_aws_says_is_shown_as_it_says_it(
    monkeypatch: pytest.MonkeyPatch, status: int, code: str, advice: str
) -> None:
    with answering(status, error_body(code, "The provided token has expired.")) as requests:
        monkeypatch.setenv("AWS_ENDPOINT_URL", requests[0])
        assert refused() == f"cannot write to the store {URL}: {code}: The provided token has expired.; {advice}"
    assert len(requests) == 2  # its URL, and one request: a refusal is not asked about again


@pytest.mark.parametrize("status", [500, 503])
def test_a_server_in_trouble_is_asked_three_times(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    with answering(status, error_body("SlowDown", "Reduce your request rate.")) as requests:
        monkeypatch.setenv("AWS_ENDPOINT_URL", requests[0])
        assert ": SlowDown: " in refused()
    assert len(requests) == 1 + s3_client.ATTEMPTS


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://no-such-host.invalid"])
def test_an_endpoint_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    message = refused()
    assert "EndpointConnectionError" in message
    assert endpoint in message


def test_a_server_that_was_there_is_waited_for_and_then_given_up(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restart in the middle costs nothing but time; an end costs no more than the patience."""
    store = open_store(URL)
    assert store.publish("r/a.bin", lambda file: file.write(b"first") and None)
    server.kill()
    back = threading.Timer(2.0, server.start)
    back.start()
    assert store.publish("r/b.bin", lambda file: file.write(b"second") and None)
    back.join()
    with store.open("r/a.bin") as file:
        assert file.read() == b"first"
    monkeypatch.setattr(s3_client, "PATIENCE_SECONDS", 1.0)
    impatient = open_store(URL)
    server.kill()
    try:
        with pytest.raises(StoreError, match=r"^head_object of r/a\.bin in s3://.* failed: EndpointConnectionError"):
            impatient.exists("r/a.bin")
    finally:
        server.start()
