"""Whatever happens to the bytes of an object, its reader gives what was written or a StoreError that names it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lrpq.errors import StoreError
from tasks.store.manifest import StageManifest, claim_run, read_manifest, read_run, write_manifest
from tasks.store.objects import ObjectStore, open_store
from tasks.store.symmetric import symmetric_index
from tasks.store.tables import read_table, write_table
from tasks.store.tensors import read_metadata, read_symmetric, read_tensors, write_symmetric, write_tensors

KEY = "r/run.json"


def table(store: ObjectStore, key: str = KEY) -> None:
    rng = np.random.default_rng(0)
    columns = {
        "name": [f"model.layers.{row}.q_proj" for row in range(50)],
        "cost": rng.standard_normal(50),
        "maybe": [None if row % 5 == 0 else row for row in range(50)],
        "ragged": [list(range(row % 4)) for row in range(50)],
    }
    write_table(store, key, columns, units={"cost": "nats"}, kind="costs")


def tensors(store: ObjectStore, key: str = KEY) -> None:
    content = {"a": torch.arange(20.0), "b": torch.ones(3, 5, dtype=torch.bfloat16), "c": torch.zeros(0)}
    write_tensors(store, key, content, {"bits": "3"})


def symmetric(store: ObjectStore, key: str = KEY) -> None:
    write_symmetric(store, key, {"x": torch.eye(6), "y": torch.ones(2, 2)}, {"x": {"tokens": 5}})


def stage_manifest(store: ObjectStore, key: str = KEY) -> None:
    manifest = StageManifest(
        stage="s", key="k", inputs={"a": "b"}, parameters={"x": [1, 2.5]}, environment={"torch": "2"}, code="c",
        objects={},
        seconds=1.5, created="2026-11-22T06:30:00+00:00",
    )  # fmt: skip
    write_manifest(store, key, manifest)


def run(store: ObjectStore, key: str = KEY) -> None:
    claim_run(store, key.split("/")[0], {"budget": 3.25, "model": "m", "files": ["a", None, True]})


CASES: list[tuple[Callable[..., None], Callable[[ObjectStore], object]]] = [
    (table, lambda store: read_table(store, KEY, "costs").to_pydict()),
    (tensors, lambda store: {name: tensor.tolist() for name, tensor in read_tensors(store, KEY).items()}),
    (tensors, lambda store: read_metadata(store, KEY)),
    (symmetric, lambda store: (read_symmetric(store, KEY, "x")[0].tolist(), read_symmetric(store, KEY, "x")[1])),
    (symmetric, lambda store: symmetric_index(store, KEY)),
    (stage_manifest, lambda store: read_manifest(store, KEY)),
    (run, lambda store: read_run(store, "r")),
]


def mutated(raw: bytes, rng: random.Random) -> bytes:
    changed = bytearray(raw)
    # The headers and footers, where lengths and offsets are, are a small part of large objects.
    low = rng.choice([0, 0, max(0, len(raw) - 2000)])
    high = rng.choice([len(raw), min(len(raw), low + 200)])
    at = rng.randrange(low, high)
    match rng.randrange(6):
        case 0:
            changed[at] ^= 1 << rng.randrange(8)
        case 1:
            changed[at] = rng.randrange(256)
        case 2:
            changed[at : at + rng.randrange(1, 20)] = rng.randbytes(rng.randrange(20))
        case 3:
            del changed[at:]
        case 4:
            del changed[: len(raw) - at]
        case _:
            changed += changed[at : at + 100]
    return bytes(changed)


@pytest.mark.parametrize(("write", "read"), CASES)
def test_mutated_objects_are_read_as_written_or_refused(
    tmp_path: Path, write: Callable[..., None], read: Callable[[ObjectStore], object]
) -> None:
    store = open_store(str(tmp_path))
    write(store)
    path = tmp_path / KEY
    raw, expected = path.read_bytes(), read(store)
    rng = random.Random(0)
    refused = 0
    for _ in range(300):
        content = mutated(raw, rng)
        path.write_bytes(content)
        try:
            found = read(store)
        except StoreError as error:
            refused += 1
            message = str(error)
            assert message.startswith(f"{KEY} in ")
            assert message.endswith("; delete it and run again")
            assert "\n" not in message
        else:
            assert found == expected, f"accepted {content!r}"
    assert refused > 100  # the mutations do reach what is read


@pytest.mark.parametrize(("write", "read"), CASES)
@pytest.mark.parametrize(("other", "_"), CASES[::2])
def test_an_object_of_another_kind_is_refused(
    tmp_path: Path,
    write: Callable[[ObjectStore], None],
    read: Callable[[ObjectStore], object],
    other: Callable[[ObjectStore], None],
    _: object,
) -> None:
    store = open_store(str(tmp_path))
    other(store)
    if other is write:
        read(store)
        return
    with pytest.raises(StoreError, match="delete it and run again"):
        read(store)


@pytest.mark.parametrize(("write", "read"), CASES)
def test_another_run_s_object_in_its_place_is_refused(
    tmp_path: Path, write: Callable[..., None], read: Callable[[ObjectStore], object]
) -> None:
    """It is whole, of the right kind and, here, of the same content: only its key tells."""
    store = open_store(str(tmp_path))
    write(store)
    write(store, "other/run.json")
    (tmp_path / KEY).write_bytes((tmp_path / "other" / "run.json").read_bytes())
    with pytest.raises(
        StoreError, match=rf'^{KEY} in .*: it is the object "other/run\.json"; delete it and run again$'
    ):
        read(store)


@pytest.mark.parametrize(("write", "read"), CASES)
def test_an_object_that_is_gone_is_named(
    tmp_path: Path, write: Callable[..., None], read: Callable[[ObjectStore], object]
) -> None:
    store = open_store(str(tmp_path))
    write(store)
    store.delete(KEY)
    with pytest.raises(StoreError, match=rf"^no object {KEY} in "):
        read(store)
