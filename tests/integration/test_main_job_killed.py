"""Workers that die and workers that hang in the middle of a run: it goes on by itself and ends in the same bytes.

Rows of the kill matrix (``make chaos`` has all of them, with nodes, servers and the driver), and two drivers of one
run. Workers are real processes that get real signals.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextvars import copy_context
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from pipeline_case import Job, Silent, contents, snapshot, start_pool, start_server, write_model

from flows.compress import run_compress
from lrpq.errors import ClusterError, StoreError
from tasks.cluster import Pool
from tasks.resources import WorkerShape
from tasks.waypoints import FOLDER, is_waypoint
from tasks.worker import WorkerState

LAYERS = 6
BETWEEN = 3
"""Blocks between waypoints."""
PATIENCE = 2.0
FAST: dict[str, Any] = {"run__candidates__bits": [2, 3, 4, 6], "evaluation__enabled": False}
pytestmark = pytest.mark.slow
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test


def process_of(state: WorkerState) -> int:
    return os.getpid()


def own_pool(workers: int = 2, **options: Any) -> Pool:
    """Workers beside the session's, on the same Ray."""
    shape = WorkerShape(num_workers=workers, num_cpus=0.0, num_gpus=0.0, kept_bytes=1 << 28)
    return Pool(shape, device="cpu", threads=1, patience=PATIENCE, **options)


@pytest.fixture(scope="module")
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job:
    start_server(request)
    return Job(start_pool(request), tmp_path_factory.mktemp("killed"))


@pytest.fixture(scope="module")
def pool(job: Job) -> Iterator[Pool]:
    pool = own_pool()
    yield pool
    for worker in list(pool.workers):
        pool._drop(worker, "the tests are done")


@pytest.fixture(scope="module")
def model(job: Job) -> Path:
    return write_model(job.folder / "model", layers=LAYERS)


@pytest.fixture(scope="module")
def undisturbed(job: Job, model: Path) -> Path:
    job(model, "undisturbed", **FAST)
    return job.folder / "undisturbed"


class Striking(Silent):
    """Progress that sends a signal to a worker when a stage has come to a unit; counts what is done again."""

    def __init__(self, pool: Pool, stage: str, after: int, sign: signal.Signals) -> None:
        super().__init__()
        self.processes = pool.get([pool.submit(i, process_of) for i in range(len(pool))])
        self.at, self.after, self.sign = stage, after, sign
        self.totals: dict[str, int] = {}
        self.done_units: dict[str, int] = {}
        self.struck = False

    def stage(self, name: str, total: int, unit: str = "block") -> None:
        super().stage(name, total, unit)
        self.totals.setdefault(name, total)
        self._strike(name)

    def advance(self, name: str, detail: str = "") -> None:
        super().advance(name, detail)
        self.done_units[name] = self.done_units.get(name, 0) + 1
        self._strike(name)

    def _strike(self, name: str) -> None:
        if name == self.at and not self.struck and self.done_units.get(name, 0) == self.after:
            self.struck = True
            os.kill(self.processes[1 if len(self.processes) > 1 and name != "assemble" else 0], self.sign)


@pytest.mark.parametrize(
    ("stage", "after", "sign", "again"),
    [
        ("profile", 2 * LAYERS - 1, signal.SIGKILL, BETWEEN + 2),  # in the backward sweep, behind a waypoint
        ("candidates", 5, signal.SIGSTOP, 0),
        ("refine", LAYERS - 1, signal.SIGKILL, BETWEEN + 1),
        ("assemble", 0, signal.SIGKILL, 0),
    ],
)
def test_a_lost_worker_costs_a_few_blocks_and_no_byte(
    job: Job, pool: Pool, model: Path, undisturbed: Path, stage: str, after: int, sign: signal.Signals, again: int
) -> None:
    """Buys: a worker process that is killed or stopped in each stage, with a fresh store for everything before it."""
    output = f"{stage}-{sign.name}"
    config = job.config(model, output, **FAST).model_copy(update={"store": str(job.folder / f"store-{output}")})
    if stage != "profile":  # what comes before the stage is not computed once more: it is the undisturbed run's
        ignore = partial(left_out, stage=stage)
        shutil.copytree(job.folder / "store", job.folder / f"store-{output}", ignore=ignore)
    progress = Striking(pool, stage, after, sign)
    manifest = run_compress(config, progress, pool=pool)
    assert progress.struck
    assert len(pool) == 2
    assert contents(job.folder / output) == contents(undisturbed)
    assert progress.done_units[stage] - progress.totals[stage] <= again
    assert any("a worker was lost" in text for text in manifest["warnings"])
    assert manifest["warnings"] == progress.notes
    assert not list((job.folder / f"store-{output}").rglob(f"{FOLDER}/*"))  # the stages are complete


def left_out(_: str, names: list[str], *, stage: str) -> set[str]:
    order = ["profile", "candidates", "forecast", "refine", "guard"]
    later = order[order.index(stage) :] if stage in order else []
    return {name for name in names if name in later}


def test_a_stage_that_ends_every_worker_is_given_up(job: Job) -> None:
    """An item that kills whoever takes it must not kill for ever; the message says what may be wrong."""
    pool = own_pool(workers=1)
    with pytest.raises(
        ClusterError, match=r"the same item was under way on 3 workers that were lost \(its process died"
    ):
        list(pool.map(_suicide, [()]))
    for worker in list(pool.workers):
        pool._drop(worker, "done")


def test_items_that_overlap_meet_where_they_read_and_compute_one_at_a_time(job: Job) -> None:
    """Two items can only end if both are under way at once."""
    pool = own_pool(workers=1)
    assert sorted(pool.map(_meet_and_compute, [(7,), (8,)], overlap=True)) == [(0, 7), (1, 8)]
    for worker in list(pool.workers):
        pool._drop(worker, "done")


def _meet_and_compute(state: WorkerState, number: int) -> int:
    state.held.setdefault("meeting", threading.Barrier(2)).wait(60)
    with state.computing:
        assert "computing" not in state.held
        state.held["computing"] = number
        time.sleep(0.1)
        assert state.held.pop("computing") == number
    return number


def _suicide(state: WorkerState) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_inputs_that_find_no_room_are_computed_again(
    job: Job, model: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Buys: a spill folder that takes nothing, as a full disk does, under a whole profile."""
    blocked = tmp_path / "file"
    blocked.write_text("no folder can be made in here")
    shape = WorkerShape(num_workers=2, num_cpus=0.0, num_gpus=0.0, kept_bytes=130_000)  # three blocks of a worker's six
    pool = Pool(shape, device="cpu", threads=1, spill_folder=str(blocked))
    config = job.config(model, "no-room", **FAST).model_copy(update={"store": str(tmp_path / "store")})
    progress = Silent()
    manifest = run_compress(config, progress, pool=pool)
    assert contents(job.folder / "no-room") == contents(undisturbed)
    assert any("no room for" in text and "they were computed twice" in text for text in manifest["warnings"])
    for worker in list(pool.workers):
        pool._drop(worker, "done")


def test_objects_that_are_gone_are_made_again_and_damaged_ones_are_named(
    job: Job, pool: Pool, model: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Buys: one object of every kind deleted from a complete run; the same command mends the store, byte for byte."""
    store = tmp_path / "store"
    shutil.copytree(job.folder / "store", store)
    kinds = (
        "windows.parquet",
        "hessians-002",
        "curvature-001",
        "token-weights-003",
        "codes-002",
        "costs-004",
        "2.mlp.up",
    )
    gone = [next(path for path in sorted(store.rglob("*")) if kind in path.name) for kind in kinds]
    before = {path: path.read_bytes() for path in gone}
    for path in gone:
        path.unlink()
    config = job.config(model, "mended", **FAST).model_copy(update={"store": str(store)})
    manifest = run_compress(config, Silent(), pool=pool)
    assert {path: path.read_bytes() for path in gone} == before
    assert contents(job.folder / "mended") == contents(undisturbed)
    assert sum("is gone from" in text for text in manifest["warnings"]) == 4  # calibrate, profile, candidates, refine

    # another run's costs are whole, and not this run's
    costs = sorted(path for path in store.rglob("costs-*"))
    costs[0].write_bytes(costs[1].read_bytes())
    with pytest.raises(StoreError, match=rf"{costs[0].name} in .*: it is the object .*{costs[1].name}.*; delete it"):
        run_compress(config, Silent(), pool=pool)
    costs[0].unlink()
    run_compress(config, Silent(), pool=pool)
    assert contents(job.folder / "mended") == contents(undisturbed)


def test_two_drivers_of_one_run_make_one_result(
    job: Job, pool: Pool, model: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Buys: both compute everything at once; whoever is second finds the object there, and none is written twice."""
    config = job.config(model, "shared", **FAST).model_copy(update={"store": str(tmp_path / "store")})
    pools = [pool, own_pool(workers=1)]
    seen: dict[str, float] = {}
    changed: list[str] = []
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.05):
            try:
                found = snapshot(tmp_path / "store") if (tmp_path / "store").exists() else {}
            except FileNotFoundError:  # a waypoint or a temporary file went away meanwhile
                continue
            published = {name: when for name, when in found.items() if "~" not in name and f"/{FOLDER}/" not in name}
            changed.extend(name for name, when in published.items() if seen.setdefault(name, when) != when)

    results: list[Any] = [None, None]

    def drive(number: int) -> None:
        try:
            results[number] = run_compress(config, Silent(), pool=pools[number])
        except Exception as error:  # noqa: BLE001 -- shown by the assertion below
            results[number] = error

    watcher = threading.Thread(target=look)
    # each in a copy of this context: Prefect's settings are in it, and without them a thread would start a server and
    # set the environment of the whole process
    drivers = [threading.Thread(target=copy_context().run, args=(drive, number)) for number in range(2)]
    watcher.start()
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join()
    torch.set_default_dtype(torch.float32)  # transformers changes it while it loads: two threads restore each other's
    ended.set()
    watcher.join()
    for result in results:
        assert isinstance(result, dict), result
    assert results[0]["content_key"] == results[1]["content_key"]
    assert contents(job.folder / "shared") == contents(undisturbed)
    assert json.loads((job.folder / "shared" / "lrpq.json").read_text())["content_key"] == results[0]["content_key"]
    assert len(seen) > 4 * LAYERS
    assert not changed
    for worker in list(pools[1].workers):
        pools[1]._drop(worker, "done")


def test_waypoints_lie_as_far_apart_as_the_bound_says() -> None:
    assert [block for block in range(LAYERS + 1) if is_waypoint(block, LAYERS)] == [BETWEEN]
    assert [block for block in range(31) if is_waypoint(block, 30)] == [6, 12, 18, 24]
    assert [block for block in range(81) if is_waypoint(block, 80)] == [9, 18, 27, 36, 45, 54, 63, 72]
