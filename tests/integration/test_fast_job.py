"""A compression with gradients of some windows: stopped on both ways of its profile, it goes on to the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_case import contents, start_pool, start_server, write_model

from benchmarks.plan import InlinePool, Stages
from flows.commands.options import nested
from flows.compress import run_compress
from flows.config import CompressConfig
from flows.presets import FAST
from lrpq.checkpoint.stored import StoredCheckpoint
from lrpq.compare.prepared import Prepared
from lrpq.compare.recipes import FAST as FAST_RECIPE
from lrpq.compare.terms import Terms
from lrpq.compare.workbench import Workbench
from lrpq.model.source import open_source
from tasks.calibration.stored import read_windows
from tasks.store.opened import open_store

BUDGET, LAYERS = 3.5, 5
"""State is stored in front of block 3."""


class StoppedError(Exception):
    """The test's own."""


class Stopping(Stages):
    """Progress that ends the run when it reads some words."""

    def __init__(self, at: str | None) -> None:
        super().__init__()
        self.at, self.seen = at, list[str]()

    def advance(self, name: str, detail: str = "") -> None:
        self.seen.append(detail)
        if detail == self.at:
            raise StoppedError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("fast") / "llama", layers=LAYERS, hidden=64, ffn=128)


def compress(
    model: Path,
    folder: Path,
    *,
    stop_at: str | None = None,
    first: str | None = None,
    refine: str = "stitch",
    pool: Any = None,
) -> dict[str, Any]:
    """Compress, from the beginning or from ``first`` on, to the end or to ``stop_at``."""
    settings = nested(FAST)
    config = CompressConfig.model_validate(
        {
            "run": {
                "model": str(model),
                "calibration": {"source": "pydoc:calibrate", "num_windows": 10, "length": 32},
                "shards": 4,
                "micro_batch": 2,
                **settings["run"],
                "candidates": {
                    "bits": [2, 3, 4],
                    "group_sizes": [32],
                    "scales": "bfloat16",
                    **settings["run"]["candidates"],
                },
            },
            "plan": {"budget_bits": BUDGET, "refine": refine},
            "evaluation": {"enabled": False},
            "cluster": {"workers": 1, "device": "cpu"},
            "output": folder / ("out" if refine == "stitch" else refine),
            "store": str(folder / "store"),
        }
    )
    progress = Stopping(stop_at)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return run_compress(config, progress, pool=pool or InlinePool(1, 1 << 40))
    finally:
        assert first in (None, next((detail for detail in progress.seen if "ward" in detail), None))
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    start_server(request)
    folder = tmp_path_factory.mktemp("undisturbed")
    manifest = compress(model, folder)
    assert manifest["configuration"]["run"]["gradients_every"] == FAST["run.gradients_every"]
    assert "refine" not in manifest["seconds"]
    assert manifest["guard"]["kept"] == "lrpq"
    assert {"stitch", "uniform"} <= set(manifest["seconds"])
    candidates = [path.name for path in (folder / "store").glob("*/candidates/*/*")]
    assert not any(name.startswith("codes") for name in candidates)
    assert any(name.startswith("costs") for name in candidates)
    return folder


def test_it_goes_on_where_it_stopped(undisturbed: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        compress(model, tmp_path, stop_at="forward, block 4")
    with pytest.raises(StoppedError):
        compress(model, tmp_path, stop_at="backward, block 1", first="forward, block 3")
    compress(model, tmp_path, first="backward, block 2")
    assert contents(tmp_path / "out") == contents(undisturbed / "out")


def test_two_workers_write_the_same_bytes(
    request: pytest.FixtureRequest, undisturbed: Path, model: Path, tmp_path: Path
) -> None:
    """Of the four shards two have no gradients."""
    compress(model, tmp_path, pool=start_pool(request))
    assert contents(tmp_path / "out") == contents(undisturbed / "out")


def test_its_profile_serves_a_refinement_without_token_weights(undisturbed: Path, model: Path) -> None:
    manifest = compress(model, undisturbed, refine="sequential")
    assert {"profile", "candidates"} <= set(manifest["reused"])
    assert manifest["seconds"]["refine"] > 0
    assert manifest["degraded"]["modules_with_rows_alone"] == 0  # nothing was rounded together
    assert contents(undisturbed / "sequential") != contents(undisturbed / "out")


def test_the_method_of_compare_is_the_pipeline(undisturbed: Path, model: Path) -> None:
    """The same plan and codes from the same windows."""
    store = undisturbed / "store"
    (path,) = store.glob("*/calibrate/*/windows.parquet")
    tokens = read_windows(open_store(str(store)), str(path.relative_to(store)))
    terms = Terms(bits=(2, 3, 4), group_sizes=(32,), shards=4, micro_batch=2)
    prepared = Prepared(Workbench(open_source(model), tokens, terms), [FAST_RECIPE], [BUDGET])
    planned = prepared.planned(FAST_RECIPE, BUDGET)
    assert planned.codes is not None
    assert len(set(planned.plan.choices.values())) > 1
    checkpoint = StoredCheckpoint(undisturbed / "out")
    for spec in prepared.bench.stream().specs:
        stored = checkpoint.weight(spec, torch.bfloat16)
        assert stored is not None
        assert torch.equal(planned.codes[spec.name].dequantize(torch.bfloat16), stored), spec.name
