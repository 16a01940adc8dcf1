"""Manifests say what is there; a run id stands for one configuration."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
from typing import BinaryIO

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lrpq.errors import RunMismatch, StoreError
from tasks.store.documents import JSON, document_bytes, parse_document, parse_object
from tasks.store.manifest import (
    StageManifest,
    claim_run,
    list_runs,
    read_manifest,
    read_run,
    utc_now,
    write_manifest,
)
from tasks.store.objects import ObjectRecord, ObjectStore, open_store, record_of

Values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(str(tmp_path))


def writing(content: bytes) -> Callable[[BinaryIO], None]:
    def write(file: BinaryIO) -> None:
        file.write(content)

    return write


def manifest(objects: dict[str, ObjectRecord], **changes: object) -> StageManifest:
    base = StageManifest(
        stage="hessians",
        key="k" * 64,
        inputs={"tokens": "t"},
        parameters={"damping": 0.01, "bits": [2, 3]},
        environment={"torch": "2.13.0"},
        code="c",
        objects=objects,
        seconds=1.25,
        created="2026-11-22T06:30:00+00:00",
        extra={"degraded": 0},
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def test_a_manifest_comes_back(store: ObjectStore) -> None:
    assert store.publish("r/h/a.bin", writing(b"abc"))
    written = manifest({"r/h/a.bin": record_of(store, "r/h/a.bin")})
    assert write_manifest(store, "r/h/manifest.json", written)
    assert read_manifest(store, "r/h/manifest.json") == written


def test_the_first_manifest_stays(store: ObjectStore) -> None:
    assert write_manifest(store, "m.json", manifest({}))
    assert not write_manifest(store, "m.json", manifest({}, seconds=9.0))
    assert read_manifest(store, "m.json").seconds == 1.25


@pytest.mark.parametrize("name", ["gone.bin", "short.bin"])
def test_a_manifest_cannot_name_what_is_not_there(store: ObjectStore, name: str) -> None:
    assert store.publish("short.bin", writing(b"ab"))
    with pytest.raises(StoreError, match=name.replace(".", r"\.")):
        write_manifest(store, "m.json", manifest({name: ObjectRecord(num_bytes=3, sha256="0" * 64)}))
    assert not store.exists("m.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra": {"loss": [1.0, math.nan]}}, r"extra\.loss\[1\] is nan"),
        ({"parameters": {"a": math.inf}}, r"parameters\.a is inf"),
        ({"parameters": {"a": {1, 2}}}, r"parameters\.a is a set"),
        ({"seconds": math.nan}, "seconds is nan"),
        ({"seconds": -1.0}, "duration is -1.0"),
        ({"created": "2026-11-22T06:30:00"}, "not UTC"),
        ({"created": "2026-11-22T06:30:00+01:00"}, "not UTC"),
        ({"created": "yesterday"}, "yesterday"),
        ({"stage": None}, "wrong type"),
        ({"inputs": {"tokens": 3}}, "inputs are not all text"),
        ({"environment": {"torch": None}}, "environment are not all text"),
    ],
)
def test_a_manifest_no_reader_would_take_is_not_written(
    store: ObjectStore, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(StoreError, match=message) as caught:
        write_manifest(store, "m.json", manifest({}, **changes))
    assert "\n" not in str(caught.value)
    assert not store.exists("m.json")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("objects", {"a": {"bytes": -1, "sha256": "0" * 64}}),
        ("objects", {"a": {"bytes": 1, "sha256": "0" * 63}}),
        ("objects", {"a": {"bytes": 1, "sha256": "G" * 64}}),
        ("objects", {"a": {"bytes": "1", "sha256": "0" * 64}}),
        ("objects", []),
        ("seconds", "1"),
        ("key", 1),
        ("extra", None),
    ],
)
def test_a_reader_checks_types_even_where_the_checksum_fits(store: ObjectStore, name: str, value: JSON) -> None:
    write_manifest(store, "m.json", manifest({}))
    with store.open("m.json") as file:
        body = parse_document(file.read(), "stage-manifest", key="m.json")
    content = document_bytes("stage-manifest", {**body, name: value}, key="bad.json")
    store.publish("bad.json", writing(content))
    with pytest.raises(StoreError, match=r"^bad\.json in .*; delete it and run again$"):
        read_manifest(store, "bad.json")


def test_the_time_is_utc() -> None:
    assert datetime.fromisoformat(utc_now()).utcoffset() == timedelta(0)


@given(st.dictionaries(st.text(), Values, max_size=4))
def test_documents_come_back_and_the_same_content_gives_the_same_bytes(body: dict[str, JSON]) -> None:
    raw = document_bytes("kind", body, key="a.json")
    assert raw == document_bytes("kind", dict(reversed(body.items())), key="a.json")
    found = parse_document(raw, "kind", key="a.json")
    assert json.dumps(found, sort_keys=True) == json.dumps(body, sort_keys=True)
    with pytest.raises(ValueError, match="kind"):
        parse_document(raw, "other", key="a.json")
    with pytest.raises(ValueError, match=r'^it is the object "a\.json"$'):
        parse_document(raw, "kind", key="b.json")


@pytest.mark.parametrize(
    "raw",
    [b"", b"null", b"[]", b"{}", b"{", b"\xff", b"NaN", b'{"a":1e999}', b'{"a":1,"a":1}', b'{"a":-Infinity}',
     b"[" * 100_000, b'{"a":' * 9999, b'{"a":' + b"9" * 10_000 + b"}"],
)  # fmt: skip
def test_what_is_no_document_is_one_error(store: ObjectStore, raw: bytes) -> None:
    store.publish("m.json", writing(raw))
    with pytest.raises(StoreError, match=r"^m\.json in .*; delete it and run again$") as caught:
        read_manifest(store, "m.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ['{"a":1,"a":1}', '{"a":{"b":1,"b":2}}', '{"a":1e999}', '{"a":NaN}', '{"a":-Infinity}', "[1]"]
)
def test_what_parsers_differ_about_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"twice|finite|not JSON|expected an object"):
        parse_object(text.encode())


def test_a_run_continues_with_its_configuration_only(store: ObjectStore) -> None:
    stored: dict[str, JSON] = {
        "model": "m",
        "budget": 3.25,
        "calibration": {"seed": 1, "files": ["a", "b"]},
        "gone": None,
    }
    claim_run(store, "run-1", stored)
    claim_run(store, "run-1", dict(reversed(stored.items())))
    assert read_run(store, "run-1") == stored
    asked: dict[str, JSON] = {
        "model": "m",
        "budget": 4.25,
        "calibration": {"seed": 2, "files": ["a"]},
        "new": "line\nbreak",
    }
    with pytest.raises(RunMismatch) as caught:
        claim_run(store, "run-1", asked)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"run run-1 in {store.url} has another configuration: ")
    for part in [
        "budget: stored 3.25, asked 4.25;",
        'calibration.files: stored ["a", "b"], asked ["a"];',
        "calibration.seed: stored 1, asked 2;",
        "gone: stored null, asked nothing;",
        r'new: stored nothing, asked "line\nbreak";',
    ]:
        assert part in message
    assert "model" not in message
    assert read_run(store, "run-1") == stored


@pytest.mark.parametrize(
    ("stored", "asked", "same"),
    [
        (3, 3.0, True),
        ([1, {"a": 2.0}], [1.0, {"a": 2}], True),
        ((1, 2), [1, 2], True),
        (1, True, False),
        (0.0, False, False),
        ([True], [1], False),
        ("3", 3, False),
        (None, False, False),
        ({}, None, False),
        ({}, [], False),
        ({"a": {}}, {"a": {"b": None}}, False),
        (0.1 + 0.2, 0.3, False),
        ([[1], {"a": 1}], [[1], {"a": 2}], False),
    ],
)
def test_numbers_compare_by_value_and_everything_else_exactly(
    store: ObjectStore, stored: JSON, asked: JSON, same: bool
) -> None:
    claim_run(store, "r", {"x": stored})
    if same:
        claim_run(store, "r", {"x": asked})
    else:
        with pytest.raises(RunMismatch, match=r"x.*: stored .*, asked "):
            claim_run(store, "r", {"x": asked})


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(configuration=st.dictionaries(st.text(), Values, max_size=4))
def test_every_configuration_matches_itself(store: ObjectStore, configuration: dict[str, JSON]) -> None:
    store.delete("r/run.json")
    claim_run(store, "r", configuration)
    claim_run(store, "r", json.loads(json.dumps(configuration)))


def test_of_racing_claims_one_configuration_wins(store: ObjectStore) -> None:
    barrier = threading.Barrier(8)

    def attempt(number: int) -> bool:
        barrier.wait(timeout=10)
        try:
            claim_run(store, "r", {"budget": number})
        except RunMismatch:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(attempt, range(8)))
    assert won.count(True) == 1
    assert read_run(store, "r") == {"budget": won.index(True)}


@pytest.mark.parametrize("run_id", ["", "a/b", "..", "/a", "a b", "~temporary"])
def test_a_run_id_is_one_name(store: ObjectStore, run_id: str) -> None:
    calls: list[Callable[[], object]] = [lambda: claim_run(store, run_id, {}), lambda: read_run(store, run_id)]
    for call in calls:
        with pytest.raises(StoreError, match="is not a"):
            call()


def test_runs_are_the_folders_with_a_configuration(store: ObjectStore) -> None:
    assert list_runs(store) == []
    for run_id in ["b", "a"]:
        claim_run(store, run_id, {"x": 1})
    store.publish("other/stage/run.json", writing(b"{}"))
    store.publish("run.json", writing(b"{}"))
    assert list_runs(store) == ["a", "b"]


def test_a_run_of_an_earlier_version_is_compared_as_this_one_reads_it(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    claim_run(store, "old", {"model": "m", "bits": [2, 3]})
    asked: dict[str, JSON] = {"model": "m", "bits": [2, 3], "rows": None}

    def as_read(stored: dict[str, JSON]) -> dict[str, JSON]:
        return {"rows": None, **stored}

    with pytest.raises(RunMismatch, match="rows"):
        claim_run(store, "old", asked)
    claim_run(store, "old", asked, as_read=as_read)
    with pytest.raises(RunMismatch, match="rows"):
        claim_run(store, "old", {**asked, "rows": 3}, as_read=as_read)
