"""The result is no worse than the uniform candidate on held-out windows, or that is what is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_case import Job, contents, start_pool, start_server, write_model

import flows.planning
from lrpq.allocate.plan import Plan
from lrpq.checkpoint.stored import StoredCheckpoint
from lrpq.errors import BudgetError, ConfigError
from lrpq.model.layers import Choice
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.streaming import BlockStream
from tasks.calibration.held_out import default_held_out, split_held_out
from tasks.calibration.stored import read_windows
from tasks.calibration.windows import Windows
from tasks.store.opened import open_store


@pytest.fixture(scope="module")
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job:
    start_server(request)
    return Job(start_pool(request), tmp_path_factory.mktemp("guard"))


@pytest.fixture(scope="module")
def model(job: Job) -> Path:
    return write_model(job.folder / "model")


@pytest.fixture(scope="module")
def good(job: Job, model: Path) -> dict[str, Any]:
    return job(model, "good", evaluation__control=False, plan__budget_bits=3.25)


def stored_windows(job: Job) -> list[torch.Tensor]:
    store = open_store(str(job.folder / "store"))
    names = sorted((job.folder / "store").glob("*/calibrate/*/*.parquet"))
    found = []
    for held_out in (path for path in names if path.name == "held-out.parquet"):
        for path in (held_out.with_name("windows.parquet"), held_out):
            found.append(read_windows(store, str(path.relative_to(job.folder / "store"))))
    return found


def test_both_are_measured_and_the_better_is_written(good: dict[str, Any], job: Job) -> None:
    guard = good["guard"]
    assert guard["kept"] == "lrpq"
    assert guard["windows"] == 1
    assert 0 < guard["lrpq"]["kl_nats"] <= guard["uniform"]["kl_nats"]
    assert guard["uniform_choice"] == "3b/g64/f8"
    assert good["degraded"]["kept_uniform"] == 0
    windows, held_out = stored_windows(job)[:2]
    assert (len(windows), len(held_out)) == (6, 1)
    assert not any(torch.equal(held_out[0], window) for window in windows)


def test_a_worse_plan_is_not_what_the_user_gets(
    job: Job, model: Path, good: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan of 2 bits everywhere stands for an allocation that went wrong: the uniform 3 bits are written."""
    solve = flows.planning.allocate.solve

    def all_narrow(problem: Any, *, solver: str) -> Plan:
        plan = solve(problem, solver=solver)
        return replace(plan, choices=dict.fromkeys(plan.choices, Choice(bits=2, group_size=64, scale_bits=8)))

    monkeypatch.setattr(flows.planning.allocate, "solve", all_narrow)
    found = job(model, "worse", evaluation__control=False, plan__budget_bits=3.25)
    guard = found["guard"]
    assert guard["kept"] == "uniform"
    assert not found["forecast"]["written"]
    assert guard["lrpq"]["kl_nats"] > guard["uniform"]["kl_nats"]
    assert found["degraded"]["kept_uniform"] == 1
    assert any("uniform is what is written" in text for text in found["warnings"])
    assert {m["bits"] for m in found["modules"]} == {3}
    assert found["budget"]["reached_bits"] <= 3.25
    # the file holds the stored candidates' codes, not the refined ones
    checkpoint = StoredCheckpoint(job.folder / "worse")
    stream = BlockStream(ModelSource(model), dtype=torch.bfloat16)
    stitched = job(model, "stitched", evaluation__control=False, plan__budget_bits=3.25, plan__refine="stitch")
    assert stitched["guard"]["kept"] == "uniform"
    assert contents(job.folder / "stitched") == contents(job.folder / "worse")
    assert all(checkpoint.weight(spec, torch.bfloat16) is not None for spec in stream.specs)
    # the same command again computes nothing
    again = job(model, "worse", evaluation__control=False, plan__budget_bits=3.25)
    assert again["computed_nothing"]


def test_with_costs_from_some_rows_codes_are_made_when_they_are_wanted(
    job: Job, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan's, those of the plans that a search measures, and the uniform ones, which a bad plan falls back to."""
    asked: dict[str, Any] = {"evaluation__control": False, "plan__refine": "stitch", "run__candidates__cost_rows": 16}
    found = job(model, "sampled", plan__max_kl=1.0, **asked)
    assert found["guard"]["lrpq"]["kl_nats"] == found["budget"]["search"]["kl_nats"] <= 1.0
    again = job(model, "sampled", plan__max_kl=1.0, **asked)
    assert again["computed_nothing"]
    assert not list((job.folder / "store").glob(f"{found['run_id']}/candidates/*/codes*"))
    solve = flows.planning.allocate.solve

    def all_narrow(problem: Any, *, solver: str) -> Plan:
        plan = solve(problem, solver=solver)
        return replace(plan, choices=dict.fromkeys(plan.choices, Choice(bits=2, group_size=64, scale_bits=8)))

    monkeypatch.setattr(flows.planning.allocate, "solve", all_narrow)
    worse = job(model, "sampled-worse", plan__budget_bits=3.25, **asked)
    assert {"profile", "candidates"} <= set(worse["reused"])
    assert worse["guard"]["kept"] == "uniform"
    assert {m["bits"] for m in worse["modules"]} == {3}
    assert worse["degraded"]["kept_uniform"] == 1


def test_it_can_be_switched_off_and_says_when_it_cannot_work(job: Job, model: Path) -> None:
    off = job(model, "off", evaluation__control=False, run__calibration__held_out=0)
    assert off["guard"] == {}
    assert not any("guarded" in text for text in off["warnings"])
    kept = job(model, "kept", evaluation__control=False, plan__keep=["*.0.*=8", "*.1.*=2"], plan__budget_bits=5.5)
    assert kept["guard"] == {}
    assert any("no uniform plan" in text for text in kept["warnings"])


def test_calibration_comes_before_what_is_held_out() -> None:
    assert [default_held_out(n) for n in (1, 8, 16, 64, 128, 1000)] == [1, 1, 2, 8, 16, 16]
    drawn = Windows(
        tokens=torch.arange(10).view(5, 2),
        source="s",
        documents_digest="",
        num_documents=1,
        stream_tokens=10,
        asked_windows=6,
        exhausted=True,
    )
    kept, rest = split_held_out(drawn, num_windows=4)
    assert (kept.num_windows, kept.missing_windows, len(rest)) == (4, 0, 1)
    kept, rest = split_held_out(drawn, num_windows=5)
    assert (kept.num_windows, kept.missing_windows, len(rest)) == (5, 0, 0)
    kept, rest = split_held_out(drawn, num_windows=7)
    assert (kept.missing_windows, len(rest)) == (2, 0)


def test_the_smallest_checkpoint_within_a_divergence(job: Job, model: Path, good: dict[str, Any]) -> None:
    """--max-kl: between what two budgets reach, the search ends between their sizes, with the limit kept."""
    wide = job(model, "wide", evaluation__control=False, plan__budget_bits=4.5)
    limit = (good["guard"]["lrpq"]["kl_nats"] * wide["guard"]["lrpq"]["kl_nats"]) ** 0.5
    found = job(model, "within", evaluation__control=False, plan__max_kl=limit)
    search = found["budget"]["search"]
    assert search["kl_nats"] == found["guard"]["lrpq"]["kl_nats"] <= limit
    assert 3.25 < found["budget"]["reached_bits"] <= search["bits"] < 5.0, search
    assert 1 <= len(search["tried"]) <= 6
    assert found["configuration"]["plan"]["max_kl"] == limit
    stages = list(job.progress.stages)
    assert stages.count("refine") == 0  # the refinement of the budget that was found is not done twice
    assert "forecast" not in stages  # what is measured already
    assert "forecast" not in found
    again = job(model, "within", evaluation__control=False, plan__max_kl=limit)
    assert again["computed_nothing"]
    assert again["budget"] == found["budget"]
    stitched = job(model, "within-stitched", evaluation__control=False, plan__max_kl=limit, plan__refine="stitch")
    assert stitched["budget"]["search"]["kl_nats"] <= limit
    assert job.progress.stages.count("refine") == 0


def test_a_divergence_that_cannot_be_kept(job: Job, model: Path) -> None:
    with pytest.raises(BudgetError, match="raise --max-kl"):
        job(model, "impossible", evaluation__control=False, plan__max_kl=1e-9)
    assert not (job.folder / "impossible").exists()
    with pytest.raises(ConfigError, match="held-out"):
        job(model, "nothing-held", plan__max_kl=0.1, run__calibration__held_out=0)
    assert "profile" not in job.progress.stages  # before the work, not after it
    only = job(model, "only", plan__max_kl=5.0, run__candidates__bits=[3], evaluation__control=False)
    assert only["budget"]["search"]["bits"] == only["budget"]["reached_bits"] == 3.125
    with pytest.raises(ConfigError, match="two budgets"):
        job.config(model, "two", plan__max_kl=0.1, plan__budget_bits=3.0)
