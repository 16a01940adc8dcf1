"""Waypoints that another driver removes are told from waypoints that cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lrpq.errors import StoreError, WaypointGone
from tasks.artifacts import StageFolder
from tasks.store.objects import ObjectStore
from tasks.store.opened import open_store
from tasks.store.tensors import write_tensors
from tasks.waypoints import (
    DELETED_AT_ONCE,
    FOLDER,
    blocks_with_waypoint,
    read_waypoint,
    remove_waypoints,
    write_waypoint,
)

FOLDER_OF_STAGE = StageFolder(run_id="run", stage="refine", key="0" * 24)


def test_a_removed_waypoint_is_gone_and_a_damaged_one_is_an_error(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    write_waypoint(store, FOLDER_OF_STAGE, "refine", 3, {0: {"x": torch.ones(2)}, 1: {"x": torch.zeros(2)}})
    assert blocks_with_waypoint(store, FOLDER_OF_STAGE, "refine", 2) == [3]
    assert set(read_waypoint(store, FOLDER_OF_STAGE, "refine", 3, [0, 1])) == {0, 1}
    (damaged,) = [p for p in (tmp_path / "store").rglob("refine-003-0001.safetensors") if FOLDER in p.parts]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(StoreError) as caught:
        read_waypoint(store, FOLDER_OF_STAGE, "refine", 3, [1])
    assert not isinstance(caught.value, WaypointGone)
    (first,) = [p for p in (tmp_path / "store").rglob("refine-003-0000.safetensors") if FOLDER in p.parts]
    first.unlink()  # the other driver is in the middle of it
    with pytest.raises(WaypointGone):
        read_waypoint(store, FOLDER_OF_STAGE, "refine", 3, [0])
    remove_waypoints(store, FOLDER_OF_STAGE)
    with pytest.raises(WaypointGone):
        read_waypoint(store, FOLDER_OF_STAGE, "refine", 3, [0])


def test_all_waypoints_are_removed_and_nothing_else(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    shards = {i: {"x": torch.ones(2)} for i in range(2 * DELETED_AT_ONCE + 1)}
    write_waypoint(store, FOLDER_OF_STAGE, "refine", 3, shards)
    write_waypoint(store, FOLDER_OF_STAGE, "refine", 6, shards)
    other = FOLDER_OF_STAGE.block("codes", 3, "safetensors")
    write_tensors(store, other, {"x": torch.ones(2)}, {})
    assert len(list(store.list(FOLDER_OF_STAGE.prefix))) == 2 * len(shards) + 1
    remove_waypoints(store, FOLDER_OF_STAGE)
    assert list(store.list(FOLDER_OF_STAGE.prefix)) == [other]


def test_a_waypoint_that_cannot_be_removed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(str(tmp_path / "store"))
    write_waypoint(store, FOLDER_OF_STAGE, "refine", 3, {i: {"x": torch.ones(2)} for i in range(DELETED_AT_ONCE)})
    delete = type(store).delete

    def refusing(self: ObjectStore, key: str) -> None:
        if key.endswith("-0002.safetensors"):
            raise StoreError(f"cannot delete {key}")
        delete(self, key)  # type: ignore[arg-type]

    monkeypatch.setattr(type(store), "delete", refusing)
    with pytest.raises(StoreError, match=r"cannot delete .*-0002"):
        remove_waypoints(store, FOLDER_OF_STAGE)
