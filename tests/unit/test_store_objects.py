"""A local store: keys stay inside, objects appear whole and once."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lrpq.errors import ConfigError, StoreError
from tasks.store.objects import ObjectStore, check_key, open_store, record_of


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(str(tmp_path / "store"))


def writing(content: bytes) -> Callable[[BinaryIO], None]:
    def write(file: BinaryIO) -> None:
        file.write(content)

    return write


def put(store: ObjectStore, key: str, content: bytes) -> bool:
    return store.publish(key, writing(content))


def read(store: ObjectStore, key: str) -> bytes:
    with store.open(key) as file:
        return file.read()


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if not path.is_dir()]


@pytest.mark.parametrize(
    "key",
    ["", "/", "/a", "a/", "a//b", ".", "..", "../a", "a/../b", "a/./b", "a/..", "a\\b", "a\n", "a\0", "a b", "ä",
     "~temporary/x",
     "a" * 256, "/".join(["a" * 100] * 10)],
)  # fmt: skip
def test_keys_that_could_leave_the_folder_are_refused_everywhere(store: ObjectStore, key: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: store.exists(key),
        lambda: store.publish(key, lambda file: None),
        lambda: store.open(key),
        lambda: store.size(key),
        lambda: store.delete(key),
    ]
    if key != "":  # the empty prefix is the whole store
        calls += [lambda: list(store.list(key)), lambda: list(store.folders(key))]
    for call in calls:
        with pytest.raises(StoreError, match="is not a valid key") as caught:
            call()
        assert "\n" not in str(caught.value)


@given(st.text(max_size=30))
@example("a=1/b_c-d.parquet")
@example("...")
@example(".a/..b")
def test_an_accepted_key_names_a_path_strictly_inside(key: str) -> None:
    try:
        segments = check_key(key)
    except StoreError:
        return
    assert "/".join(segments) == key
    joined = Path("/store", *segments)
    assert os.path.normpath(joined) == str(joined)
    assert str(joined).startswith("/store/")
    assert key.isascii()
    assert key.isprintable()


def test_an_object_is_published_once_and_never_changed(store: ObjectStore, tmp_path: Path) -> None:
    assert not store.exists("run/a/x.bin")
    assert put(store, "run/a/x.bin", b"first")
    assert not put(store, "run/a/x.bin", b"second!")
    assert read(store, "run/a/x.bin") == b"first"
    assert store.size("run/a/x.bin") == 5
    assert files_below(tmp_path) == [tmp_path / "store/run/a/x.bin"]


def test_of_racing_writers_one_wins_and_all_read_the_winner(store: ObjectStore, tmp_path: Path) -> None:
    barrier = threading.Barrier(8)

    def attempt(number: int) -> bool:
        def write(file: BinaryIO) -> None:
            barrier.wait(timeout=10)  # all have looked and found nothing before the first one publishes
            file.write(bytes([number]) * 1000)

        return store.publish("run/race.bin", write)

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(attempt, range(8)))
    assert won.count(True) == 1
    assert read(store, "run/race.bin") == bytes([won.index(True)]) * 1000
    assert len(files_below(tmp_path)) == 1


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt()])
def test_a_writer_that_fails_midway_leaves_nothing(store: ObjectStore, tmp_path: Path, error: BaseException) -> None:
    def write(file: BinaryIO) -> None:
        file.write(b"half")
        raise error

    with pytest.raises(type(error)):
        store.publish("run/x.bin", write)
    assert not store.exists("run/x.bin")
    assert files_below(tmp_path) == []


def test_the_content_is_on_disk_before_the_name_is(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, link = os.fsync, os.link

    def recording_fsync(descriptor: int) -> None:
        events.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    def recording_link(source: object, target: object) -> None:
        events.append("link")
        link(source, target)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "link", recording_link)
    put(store, "run/x.bin", b"x")
    assert events == ["file", "folder", "link", "folder"]  # the first folder entry is that of run/


def test_a_full_disk_is_one_line_and_leaves_nothing(store: ObjectStore, tmp_path: Path) -> None:
    def write(file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StoreError, match=r"cannot write run/x\.bin in .*No space left") as caught:
        store.publish("run/x.bin", write)
    assert "\n" not in str(caught.value)
    assert files_below(tmp_path) == []


def test_listing_is_sorted_recursive_and_knows_no_temporary_files(store: ObjectStore, tmp_path: Path) -> None:
    for key in ["b/2.bin", "b/1.bin", "b/c/3.bin", "a/run.json", "a-b/1.bin", "top.bin"]:
        put(store, key, b"x")
    (tmp_path / "store" / "~temporary" / "1-left").write_bytes(b"half")
    (tmp_path / "store" / "not a key").write_bytes(b"foreign")
    assert list(store.list()) == ["a-b/1.bin", "a/run.json", "b/1.bin", "b/2.bin", "b/c/3.bin", "top.bin"]
    assert list(store.list("b")) == ["b/1.bin", "b/2.bin", "b/c/3.bin"]
    assert list(store.list("nothing")) == []
    assert list(store.folders()) == ["a", "a-b", "b"]
    assert list(store.folders("b")) == ["c"]


def test_delete_makes_room_for_a_new_object(store: ObjectStore) -> None:
    store.delete("a.bin")
    put(store, "a.bin", b"old")
    store.delete("a.bin")
    assert put(store, "a.bin", b"new")
    assert read(store, "a.bin") == b"new"


def test_a_missing_object_is_named(store: ObjectStore) -> None:
    for call in (store.open, store.size):
        with pytest.raises(StoreError, match=r"no object a/b\.bin in .*store"):
            call("a/b.bin")


def test_symbolic_links_lead_nowhere(store: ObjectStore, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    root = tmp_path / "store"
    (root / "folder").symlink_to(outside)
    (root / "file").symlink_to(outside / "secret")
    (root / "loop").symlink_to(root / "loop")
    (root / "again").symlink_to(root)
    for key in ["folder/secret", "folder/new", "file"]:
        for call in (store.exists, store.open, store.size, store.delete):
            with pytest.raises(StoreError, match="symbolic link"):
                call(key)
        with pytest.raises(StoreError, match="symbolic link"):
            store.publish(key, lambda file: None)
    with pytest.raises(StoreError):
        store.open("loop")
    assert list(store.list()) == []
    assert [path.name for path in outside.iterdir()] == ["secret"]


def test_records_describe_what_is_stored_even_after_a_lost_race(store: ObjectStore) -> None:
    assert store.publish("a.bin", writing(b"winner"))
    assert not store.publish("a.bin", writing(b"a loser"))
    found = record_of(store, "a.bin")
    assert (found.num_bytes, found.sha256) == (6, hashlib.sha256(b"winner").hexdigest())


def test_urls_of_one_folder_open_one_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    put(open_store("./my store"), "a.bin", b"x")
    urls = [
        "my store",
        str(tmp_path / "my store"),
        f"file://{tmp_path}/my%20store",
        f"file://localhost{tmp_path}/my%20store",
    ]
    for url in urls:
        assert list(open_store(url).list()) == ["a.bin"]


@pytest.mark.parametrize(
    "url",
    ["", "a\0b", "http://x/y", "gs://bucket/x", "file://host/x", "file://", "file:///x?y", "s3://", "s3://B/x",
     "s3://bucket/a//b",
     "s3://bucket/../x", "s3://user:secret@bucket/x", "s3://bucket/" + "p" * 200],
)  # fmt: skip
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_store(url)
    assert "\n" not in str(caught.value)


def test_s3_without_s3fs_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package s3fs: install lrpq\[s3\]"):
        open_store("s3://bucket/prefix")


def test_a_store_that_cannot_be_written_is_refused_when_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for url in [str(tmp_path / "file"), str(tmp_path / "file" / "below"), "/proc/lrpq"]:
        with pytest.raises(StoreError, match="cannot write to the store") as caught:
            open_store(url)
        assert "\n" not in str(caught.value)


def test_a_file_system_without_hard_links_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: object, target: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StoreError, match="cannot hard-link files"):
        open_store(str(tmp_path))
    assert files_below(tmp_path) == []


def test_a_file_system_that_links_over_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", lambda source, target: Path(target).write_bytes(b""))
    with pytest.raises(StoreError, match="links over existing files"):
        open_store(str(tmp_path))


def test_a_link_whose_answer_was_lost_counts_as_won(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def answer_twice(source: str, target: str) -> None:
        link(source, target)
        raise FileExistsError(errno.EEXIST, "File exists")

    monkeypatch.setattr(os, "link", answer_twice)
    assert put(store, "a.bin", b"x")


def test_opening_sweeps_what_killed_processes_left_long_ago(tmp_path: Path) -> None:
    open_store(str(tmp_path))
    old, new = tmp_path / "~temporary" / "1-old", tmp_path / "~temporary" / "2-new"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    open_store(str(tmp_path))
    assert not old.exists()
    assert new.exists()
