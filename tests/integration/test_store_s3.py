"""The store on a real S3 server (SeaweedFS)."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import BinaryIO

import pytest
import torch
from chaos.services import BUCKET, KEY, SECRET, S3Server, free_ports

from lrpq.errors import RunMismatch, StoreError
from tasks.store import s3_files
from tasks.store.manifest import claim_run, list_runs, read_run
from tasks.store.objects import ObjectStore, open_store, record_of
from tasks.store.s3_client import S3Client
from tasks.store.tables import read_table, write_table
from tasks.store.tensors import read_symmetric, read_tensors, write_symmetric, write_tensors


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running server."""
    server = S3Server(tmp_path_factory.mktemp("seaweedfs"))
    try:
        server.start()
        yield server.url
    finally:
        server.kill()


@pytest.fixture
def credentials(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def store(credentials: None, request: pytest.FixtureRequest) -> ObjectStore:
    """A store of its own for every test."""
    return open_store(f"s3://{BUCKET}/{hashlib.sha256(request.node.name.encode()).hexdigest()[:12]}/runs")


def put(store: ObjectStore, key: str, content: bytes) -> bool:
    def write(file: BinaryIO) -> None:
        file.write(content)

    return store.publish(key, write)


def test_objects_come_back_and_are_never_changed(store: ObjectStore) -> None:
    assert not store.exists("r/a.bin")
    assert put(store, "r/a.bin", b"first")
    assert not put(store, "r/a.bin", b"second!")
    with store.open("r/a.bin") as file:
        assert file.read() == b"first"
    assert store.size("r/a.bin") == 5
    store.delete("r/a.bin")
    assert not store.exists("r/a.bin")
    assert put(store, "r/a.bin", b"second!")
    assert record_of(store, "r/a.bin").num_bytes == 7


def test_an_open_object_can_be_read_anywhere(store: ObjectStore) -> None:
    content = bytes(range(256)) * 20_000
    put(store, "a.bin", content)
    with store.open("a.bin") as file:
        assert file.seek(0, 2) == len(content)
        assert file.read(1) == b""
        for start, count in [(0, 10), (len(content) - 3, 100), (1_000_000, 3_000_000), (5, 0), (1 << 20, 1 << 20)]:
            assert file.seek(start) == start
            assert file.read(count) == content[start : start + count]
        file.seek(0)
        assert file.read() == content
        with pytest.raises(OSError, match="before the start"):
            file.seek(-1)


def test_listing(store: ObjectStore) -> None:
    keys = ["a-b/1.bin", "a/run.json", "b/1.bin", "b/2.bin", "b/c/3.bin", "top.bin"]
    for key in reversed(keys):
        put(store, key, b"x")
    assert list(store.list()) == keys  # and no probe
    assert list(store.list("b")) == ["b/1.bin", "b/2.bin", "b/c/3.bin"]
    assert list(store.list("b/c")) == ["b/c/3.bin"]
    assert list(store.list("nothing")) == []
    assert list(store.folders()) == ["a", "a-b", "b"]
    assert list(store.folders("b")) == ["c"]
    with pytest.raises(StoreError, match="not a valid key"):
        list(store.list("../other"))


def test_a_long_listing_has_several_pages(store: ObjectStore) -> None:
    keys = [f"many/{index:04d}.bin" for index in range(1005)]
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda key: store.client.put(key, b""), keys))  # type: ignore[attr-defined]
    assert list(store.list("many")) == keys


@pytest.mark.parametrize("num_bytes", [1000, 6_000_000])
def test_of_racing_writers_one_wins(store: ObjectStore, num_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_files, "PART_BYTES", 5 * 2**20)  # the smallest part S3 takes: the longer object has two
    barrier = threading.Barrier(8)

    def attempt(number: int) -> bool:
        def write(file: BinaryIO) -> None:
            barrier.wait(timeout=60)  # all have looked and found nothing before the first one publishes
            file.write(bytes([number]) * num_bytes)

        return store.publish("race.bin", write)

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(attempt, range(8)))
    assert won.count(True) == 1
    with store.open("race.bin") as file:
        assert file.read() == bytes([won.index(True)]) * num_bytes
    assert list(store.list()) == ["race.bin"]


def test_a_claim_that_a_dead_writer_left_is_taken_over(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_files, "PART_BYTES", 5 * 2**20)
    monkeypatch.setattr(s3_files, "CLAIM_SECONDS", 0.5)
    client: S3Client = store.client  # type: ignore[attr-defined]
    assert client.put("~claims/a.bin", b"")
    assert put(store, "a.bin", b"x" * 6_000_000)
    assert store.size("a.bin") == 6_000_000
    assert client.size("~claims/a.bin") is None


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_objects_around_the_length_of_a_part(store: ObjectStore, extra: int, monkeypatch: pytest.MonkeyPatch) -> None:
    part = 5 * 2**20
    monkeypatch.setattr(s3_files, "PART_BYTES", part)
    content = os.urandom(2 * part + extra)

    def write(file: BinaryIO) -> None:
        for start in range(0, len(content), 999_983):
            file.write(content[start : start + 999_983])

    assert store.publish("a.bin", write)
    assert record_of(store, "a.bin").sha256 == hashlib.sha256(content).hexdigest()


def test_a_writer_that_fails_midway_leaves_nothing(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_files, "PART_BYTES", 5 * 2**20)

    def write(file: BinaryIO) -> None:
        file.write(b"x" * 11_000_000)
        raise RuntimeError("bug")

    with pytest.raises(RuntimeError, match="bug"):
        store.publish("a.bin", write)
    assert not store.exists("a.bin")
    bucket = store.client.files.call_s3("list_multipart_uploads", Bucket=BUCKET)  # type: ignore[attr-defined]
    assert not [upload for upload in bucket.get("Uploads", ()) if store.client.prefix in upload["Key"]]  # type: ignore[attr-defined]


def test_tables_tensors_and_matrices(store: ObjectStore) -> None:
    write_table(store, "r/t.parquet", {"name": ["a", "b"], "cost": [0.5, 1.5]}, units={"cost": "nats"}, kind="costs")
    assert read_table(store, "r/t.parquet", "costs").to_pydict() == {"name": ["a", "b"], "cost": [0.5, 1.5]}
    tensors = {"a": torch.randn(300, 300), "b": torch.arange(5)}
    write_tensors(store, "r/t.safetensors", tensors, {"bits": "3"})
    assert torch.equal(read_tensors(store, "r/t.safetensors", ["a"])["a"], tensors["a"])
    matrix = torch.randn(700, 700)
    matrix = matrix + matrix.T
    write_symmetric(store, "r/h.parquet", {"x": matrix, "y": torch.eye(3)}, {"x": {"tokens": 7.0}})
    found, scalars = read_symmetric(store, "r/h.parquet", "x")
    assert torch.equal(found, matrix)
    assert scalars == {"tokens": 7.0}


def test_truncated_objects_are_refused(store: ObjectStore) -> None:
    write_tensors(store, "t.safetensors", {"a": torch.ones(100)})
    with store.open("t.safetensors") as file:
        put(store, "short.safetensors", file.read()[:-1])
    with pytest.raises(StoreError, match=r"^short\.safetensors in s3://.*; delete it and run again$"):
        read_tensors(store, "short.safetensors")


def test_runs(store: ObjectStore) -> None:
    claim_run(store, "one", {"budget": 3.25})
    claim_run(store, "one", {"budget": 3.25})
    claim_run(store, "two", {"budget": 4})
    with pytest.raises(RunMismatch, match=r"budget: stored 3\.25, asked 4\.25"):
        claim_run(store, "one", {"budget": 4.25})
    assert list_runs(store) == ["one", "two"]
    assert read_run(store, "two") == {"budget": 4}


def test_a_missing_object_is_named(store: ObjectStore) -> None:
    for call in (store.open, store.size):
        with pytest.raises(StoreError, match=r"no object a/b\.bin in s3://"):
            call("a/b.bin")


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("AWS_SECRET_ACCESS_KEY", "wrong", "SignatureDoesNotMatch"),
        ("AWS_ACCESS_KEY_ID", "nobody", "InvalidAccessKeyId"),
    ],
)
def test_wrong_credentials_are_one_clear_line(
    credentials: None, monkeypatch: pytest.MonkeyPatch, name: str, value: str, reason: str
) -> None:
    monkeypatch.setenv(name, value)
    url = f"s3://{BUCKET}/x"
    with pytest.raises(StoreError, match=f"^cannot write to the store {url}: {reason}: .*credentials") as caught:
        open_store(url)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_credentials_that_turn_wrong_are_one_clear_line(
    store: ObjectStore, credentials: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, "a.bin", b"x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    store.client.files.connect(refresh=True)  # type: ignore[attr-defined]
    calls: list[Callable[[], object]] = [
        lambda: store.exists("a.bin"),
        lambda: put(store, "b.bin", b"x"),
        lambda: store.open("a.bin"),
        lambda: list(store.list()),
        lambda: store.delete("a.bin"),
    ]
    for call in calls:
        with pytest.raises(StoreError, match=r"in s3://.* failed: ") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_no_server_is_one_clear_line(credentials: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_ports(1)[0]}")
    with pytest.raises(
        StoreError, match=r"^cannot write to the store s3://nobody/x: EndpointConnectionError"
    ) as caught:
        open_store("s3://nobody/x")
    assert "\n" not in str(caught.value)


def test_a_server_that_ignores_the_condition_is_refused(credentials: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Careless(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # answers "Expect: 100-continue"

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            assert self.headers["If-None-Match"] == "*"
            self.send_response(200)
            self.send_header("ETag", '"x"')
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_DELETE(self) -> None:
            self.send_response(204)
            self.end_headers()

        def log_message(self, *values: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Careless) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
            with pytest.raises(StoreError, match=r"ignores 'If-None-Match: \*'"):
                open_store(f"s3://{BUCKET}/x")
        finally:
            server.shutdown()
            thread.join()
