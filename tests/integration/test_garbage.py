"""``lrpq gc``: abandoned things go, what a live or a finished run needs never does; in a folder, on S3."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import BinaryIO

import pytest
import test_store_s3

from flows.cli import run
from lrpq.errors import StoreError
from tasks.store import garbage
from tasks.store.garbage import Entry, find_garbage, mark_start, remove_garbage
from tasks.store.manifest import StageManifest, claim_run, utc_now, write_manifest
from tasks.store.objects import ObjectStore, open_store

credentials, endpoint, remote = test_store_s3.credentials, test_store_s3.endpoint, test_store_s3.store
DAY = 24 * 3600.0
OLD = 30 * DAY


def put(store: ObjectStore, key: str, content: bytes = b"x" * 10) -> None:
    def write(file: BinaryIO) -> None:
        file.write(content)

    assert store.publish(key, write)


def finish(store: ObjectStore, folder: str, *, key: str, inputs: dict[str, str], objects: list[str] | None) -> None:
    extra = {} if objects is None else {"objects": objects}
    manifest = StageManifest(
        stage="profile",
        key=key,
        inputs=inputs,
        parameters={},
        environment={},
        code="",
        objects={},
        seconds=1.0,
        created=utc_now(),
        extra=extra,
    )
    assert write_manifest(store, f"{folder}/manifest.json", manifest)


def fill(store: ObjectStore) -> dict[str, str]:
    """A finished run, an interrupted one, and things that nobody needs; name -> why it may go."""
    used = "b" * 64
    claim_run(store, "done", {"model": "m"})
    put(store, f"done/profile/{'a' * 24}/hessians-000.parquet")
    put(store, f"done/profile/{'a' * 24}/waypoints/gradients-001-0000.safetensors")
    finish(store, f"done/profile/{'a' * 24}", key="a" * 64, inputs={}, objects=["hessians-000.parquet"])
    put(store, f"done/candidates/{used[:24]}/codes-000-qkv.safetensors")  # an input, though it has no manifest
    finish(store, f"done/refine/{'c' * 24}", key="c" * 64, inputs={"codes": used}, objects=None)
    put(store, f"done/refine/{'c' * 24}/model.layers.0.q.safetensors")
    put(store, f"done/refine/{'d' * 24}/model.layers.0.q.safetensors")
    mark_start(store, "done")
    claim_run(store, "stopped", {"model": "m"})
    put(store, f"stopped/candidates/{'e' * 24}/codes-000-qkv.safetensors")
    put(store, f"stopped/candidates/{'e' * 24}/costs-000-qkv.parquet")
    put(store, "evaluations/windows/0123.parquet")
    put(store, "somebody/else.txt")
    return {
        f"done/profile/{'a' * 24}/waypoints/gradients-001-0000.safetensors": "not named by its stage's manifest",
        f"done/refine/{'d' * 24}/model.layers.0.q.safetensors": "of a stage that was never completed",
        f"stopped/candidates/{'e' * 24}/codes-000-qkv.safetensors": "of a stage that was never completed",
        f"stopped/candidates/{'e' * 24}/costs-000-qkv.parquet": "of a stage that was never completed",
        "evaluations/windows/0123.parquet": "windows of an evaluation outside of a run",
    }


@pytest.fixture
def aged(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Everything is a month old, but for the names in the set."""
    young: set[str] = set()
    listed = garbage.entries

    def older(store: ObjectStore) -> list[Entry]:
        return [
            entry
            if entry.name in young
            else Entry(
                name=entry.name,
                num_bytes=entry.num_bytes,
                age_seconds=entry.age_seconds + OLD,
                upload_id=entry.upload_id,
            )
            for entry in listed(store)
        ]

    monkeypatch.setattr(garbage, "entries", older)
    return young


def check(store: ObjectStore, young: set[str]) -> None:
    expected = fill(store)
    everything = set(store.list())
    found = find_garbage(store)
    assert {i.entry.name: i.reason for i in found.garbage if i.reason != "mark of a start"} == expected
    assert [i.reason for i in found.garbage].count("mark of a start") == 1
    assert (found.foreign, found.live_runs, found.doubtful) == (1, (), ())
    assert set(store.list()) == everything, "a dry run changed the store"
    # the interrupted run goes on between the look and the removal
    mark_start(store, "stopped")
    young.add(next(name for name in store.list() if name.startswith("stopped/starts/")))
    removed = remove_garbage(store, found)
    gone = everything - set(store.list())
    assert gone == {i.entry.name for i in removed.garbage}
    assert not any(name.startswith("stopped/") for name in gone)
    assert removed.live_runs == ("stopped",)
    assert {name for name in expected if not name.startswith("stopped/")} <= gone
    # what the finished run names is whole
    assert store.exists(f"done/profile/{'a' * 24}/hessians-000.parquet")
    assert store.exists(f"done/candidates/{'b' * 24}/codes-000-qkv.safetensors")
    assert store.exists(f"done/refine/{'c' * 24}/model.layers.0.q.safetensors")
    assert store.exists("done/run.json")
    assert store.exists("somebody/else.txt")


def test_folder(tmp_path: Path, aged: set[str]) -> None:
    check(open_store(str(tmp_path / "store")), aged)


def test_s3(remote: ObjectStore, aged: set[str]) -> None:
    store = remote
    check(store, aged)
    # an upload that was never completed
    client = store.client  # type: ignore[attr-defined]
    upload = client.call("create_multipart_upload", "done/large")["UploadId"]
    found = find_garbage(store)
    assert [i.reason for i in found.garbage if i.entry.upload_id == upload] == ["upload that was never completed"]
    remove_garbage(store, found)
    assert not [i for i in find_garbage(store).garbage if i.entry.upload_id]


def test_nothing_young_is_garbage(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    fill(store)
    (tmp_path / "store" / "~temporary" / "1-2").write_bytes(b"x")
    assert find_garbage(store).garbage == ()
    with pytest.raises(StoreError, match="not safe beside running jobs"):
        find_garbage(store, older_than=60.0)


def test_old_temporaries_go_even_beside_a_live_run(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    fill(store)
    left = tmp_path / "store" / "~temporary" / "1-2"
    left.write_bytes(b"x")
    os.utime(left, (time.time() - 2 * DAY, time.time() - 2 * DAY))
    found = find_garbage(store, older_than=DAY)
    assert [item.entry.name for item in found.garbage] == ["~temporary/1-2"]
    remove_garbage(store, found, older_than=DAY)
    assert not left.exists()
    assert (tmp_path / "store" / "~temporary").is_dir()


def test_a_damaged_manifest_protects_its_stage(tmp_path: Path, aged: set[str]) -> None:
    store = open_store(str(tmp_path / "store"))
    fill(store)
    path = tmp_path / "store" / "done" / "profile" / ("a" * 24) / "manifest.json"
    path.write_bytes(path.read_bytes()[:-20])
    found = find_garbage(store)
    assert found.doubtful == (f"done/profile/{'a' * 24}/manifest.json",)
    assert not [i for i in found.garbage if i.entry.name.startswith(f"done/profile/{'a' * 24}")]
    assert not aged


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = tmp_path / "store"
    store = open_store(str(where))
    fill(store)
    old = time.time() - OLD
    for path in where.rglob("*"):
        os.utime(path, (old, old))
    assert run(["gc", str(where), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert not document["deleted"]
    assert len(document["garbage"]) == 6
    assert run(["gc", str(where), "--delete"]) == 0
    assert "6 objects, 58 B removed" in capsys.readouterr().out
    assert run(["gc", str(where), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["garbage"] == []
    assert run(["gc", str(where), "--older-than", "soon"]) == 2
