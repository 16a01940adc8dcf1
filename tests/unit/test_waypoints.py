"""Waypoints that another driver removes are told from waypoints that cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lrpq.errors import StoreError, WaypointGone
from tasks.artifacts import StageFolder
from tasks.store.opened import open_store
from tasks.waypoints import FOLDER, blocks_with_waypoint, read_waypoint, remove_waypoints, write_waypoint

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
