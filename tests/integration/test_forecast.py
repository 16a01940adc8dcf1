"""A run says what to expect of its result before it refines, on the windows that it has for that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pipeline_case import Job, start_pool, start_server, write_model

import flows.forecasting
from lrpq.allocate.forecast import MOST_WINDOWS, SPREAD, measured_windows, stride_of
from lrpq.errors import CheckpointError
from tasks.store.manifest import read_manifest
from tasks.store.opened import open_store

MANY: dict[str, Any] = {
    "evaluation__control": False,
    "evaluation__num_windows": 18,
    "evaluation__length": 32,
}


@pytest.fixture(scope="module")
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job:
    start_server(request)
    return Job(start_pool(request), tmp_path_factory.mktemp("forecast"))


@pytest.fixture(scope="module")
def model(job: Job) -> Path:
    return write_model(job.folder / "model")


def test_it_is_said_before_the_refinement(job: Job, model: Path) -> None:
    """On every second of 18 windows, which are more than it takes; both workers have some of these."""
    found = job(model, "many", **MANY)
    expected = found["forecast"]
    assert (expected["windows"], expected["length"], expected["source"]) == (9, 32, "pydoc:evaluate")
    stages = job.progress.stages
    assert stages.index("allocate") < stages.index("forecast") < stages.index("refine")
    (line,) = job.progress.told
    assert f"KL {expected['kl_nats']:.3f} nats a token" in line
    assert expected["range_nats"] == [share * expected["kl_nats"] for share in SPREAD]
    assert expected["written"]
    assert f"{expected['candidates']['kl_nats']:.4f} on 9 x 32 tokens of pydoc:evaluate" in line
    # the same windows, measured as the result of a run that stops at the candidates
    stitched = job(model, "stitched", plan__refine="stitch", **MANY)
    assert "forecast" not in stitched
    assert job.progress.told == []
    rows = windows_of(job, stitched)
    assert len(rows) == 18
    mean = sum(row["kl_nats"] for row in rows[::2]) / 9
    assert expected["candidates"]["kl_nats"] == pytest.approx(mean, rel=1e-9)
    assert expected["candidates"]["kl_nats"] != pytest.approx(stitched["evaluation"]["lrpq"]["kl_nats"], rel=1e-6)


def test_without_a_text_to_measure_on_it_is_of_held_out_windows(job: Job, model: Path) -> None:
    found = job(model, "held-out", evaluation__enabled=False)
    assert "evaluation" not in found
    assert found["forecast"]["source"] == "pydoc:calibrate, held out"
    assert (found["forecast"]["windows"], found["forecast"]["length"]) == (1, 48)
    assert found["forecast"]["candidates"]["kl_nats"] > 0
    nothing = job(model, "nothing", evaluation__enabled=False, run__calibration__held_out=0)
    assert "forecast" not in nothing
    assert job.progress.told == []


@pytest.mark.parametrize(
    "asked",
    [
        {"evaluation__forecast": False},
        {"run__candidates__cost_rows": 16},  # there are no candidates to measure
        {"run__candidates__quantize_head": 8},  # whose codes are not refined
        {"plan__correction": 0.0},  # of a refinement without it nothing is known
    ],
)
def test_where_it_is_not_wanted_or_not_known_there_is_none(job: Job, model: Path, asked: dict[str, Any]) -> None:
    found = job(model, f"none-{next(iter(asked))}", evaluation__control=False, **asked)
    assert "refine" in found["seconds"]
    assert "forecast" not in found
    assert job.progress.told == []


def test_candidates_whose_logits_are_not_finite_end_no_run(
    job: Job, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise CheckpointError("variant candidates: logits are not finite on the evaluation text")

    monkeypatch.setattr(flows.forecasting, "score_stored", fails)
    found = job(model, "not-finite", evaluation__control=False)
    assert "forecast" not in found
    assert any(text.startswith("no forecast: variant candidates: logits") for text in found["warnings"])


@pytest.mark.parametrize("number", [1, 15, 16, 17, 32, 33, 64, 1000])
def test_it_takes_few_windows_spread_over_all(number: int) -> None:
    taken = range(0, number, stride_of(number))
    assert min(number, MOST_WINDOWS // 2) <= len(taken) == measured_windows(number) <= MOST_WINDOWS
    assert taken[-1] >= number - stride_of(number)
    assert measured_windows(0) == 0


def windows_of(job: Job, manifest: dict[str, Any]) -> list[dict[str, float]]:
    """Scores of the result, a row a window, as the stage stored them."""
    store, run_id = open_store(str(job.folder / "store")), manifest["run_id"]
    stages = [
        read_manifest(store, f"{run_id}/evaluate/{key}/manifest.json") for key in store.folders(f"{run_id}/evaluate")
    ]
    (found,) = [s.extra for s in stages if s.extra["summary"]["lrpq"] == manifest["evaluation"]["lrpq"]]
    rows: list[dict[str, float]] = found["windows"]["lrpq"]
    return rows
