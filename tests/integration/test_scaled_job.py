"""A compression whose sites are scaled by powers of two: the whole job, against the same without them.

With scales of 16 bits a power of two cancels everywhere: choices, codes and scores are the very same, and only their
magnitude is another.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_case import Job, contents, start_pool, start_server, write_model
from transformers import AutoModelForCausalLM

import flows.compress
import flows.compression
from flows import cli
from flows.changes import change_of, stored_change
from lrpq.checkpoint.stored import StoredCheckpoint
from lrpq.model.source import open_source
from lrpq.transform.changed import changed_as_stored
from lrpq.transform.magnitudes import choose_exponents
from tasks.cluster import Pool

WINDOWS, LENGTH = 4, 48


@pytest.fixture(scope="module")
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job:
    start_server(request)
    return Job(start_pool(request), tmp_path_factory.mktemp("scaled-job"), scales="bfloat16")


@pytest.fixture(scope="module")
def model(job: Job) -> Path:
    """bf16, tied."""
    return write_model(job.folder / "model", hidden=128, tied=True)


@contextmanager
def scaling() -> Iterator[None]:
    """Runs inside scale their sites."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            flows.compression, "change_of", lambda config, source, **_: change_of(config, source, scaled=True)
        )
        yield


@pytest.fixture(scope="module")
def plain(job: Job, model: Path) -> dict[str, Any]:
    return job(model, "plain", run_id="plain")


@pytest.fixture(scope="module")
def scaled(job: Job, model: Path) -> dict[str, Any]:
    with scaling():
        return job(model, "scaled", run_id="scaled")


@pytest.fixture(scope="module")
def both(job: Job, model: Path) -> dict[str, Any]:
    """Rotated, then scaled."""
    with scaling():
        return job(model, "both", run__rotate="hadamard", run_id="both")


def evaluated(job: Job, name: str, model: Path, capfd: pytest.CaptureFixture[str], store: Path) -> dict[str, Any]:
    """What ``lrpq evaluate`` prints, on the session's pool."""

    @contextmanager
    def open_shared(**_: object) -> Iterator[Pool]:
        yield job.pool

    capfd.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flows.compress, "open_pool", open_shared)
        patch.setenv("LRPQ_STORE", str(store))
        asked = ("evaluate", job.folder / name, "--reference", model, "--evaluation", "pydoc:evaluate")
        more = ("--evaluation-windows", WINDOWS, "--evaluation-length", LENGTH, "--json")
        assert cli.run([str(argument) for argument in (*asked, *more)]) == 0
    found: dict[str, Any] = json.loads(capfd.readouterr().out)["evaluation"]
    return found


@torch.no_grad()
def test_it_is_the_model_without_them(job: Job, model: Path, plain: dict[str, Any], scaled: dict[str, Any]) -> None:
    assert plain["exponents"] is None
    assert stored_change(scaled).exponents == choose_exponents(open_source(model))
    assert not {"profile", "candidates", "refine"} & set(scaled["reused"])  # other weights, of another identity
    assert scaled["modules"] == plain["modules"]
    assert scaled["evaluation"] == plain["evaluation"]
    assert scaled["evaluation"]["lrpq"]["kl_nats"] > 0
    assert scaled["verified"]["max_abs_difference"] == 0.0
    tokens = torch.arange(3, 43)[None]
    logits = [AutoModelForCausalLM.from_pretrained(job.folder / name)(tokens).logits for name in ("plain", "scaled")]
    assert torch.equal(*logits)
    before, after = StoredCheckpoint(job.folder / "plain"), StoredCheckpoint(job.folder / "scaled")
    k = scaled["exponents"]["blocks"][0]["gate_up"]
    gate = "model.layers.0.mlp.gate_proj"
    assert k > 0
    assert torch.equal(after.codes(gate).codes, before.codes(gate).codes)
    assert torch.equal(after.codes(gate).scales, before.codes(gate).scales * 2.0**k)


def test_the_same_again_computes_nothing(job: Job, model: Path, scaled: dict[str, Any]) -> None:
    with scaling():
        again = job(model, "again", run_id="scaled")
    assert again["computed_nothing"]
    assert contents(job.folder / "again") == contents(job.folder / "scaled")


def test_evaluate_measures_the_same(
    job: Job,
    model: Path,
    scaled: dict[str, Any],
    both: dict[str, Any],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name, manifest in (("scaled", scaled), ("both", both)):
        found = evaluated(job, name, model, capfd, tmp_path / "store")
        assert found["reference"] == manifest["evaluation"]["reference"]
        assert found["checkpoint"] == manifest["evaluation"]["lrpq"]


def test_on_top_of_a_rotation(job: Job, model: Path, scaled: dict[str, Any], both: dict[str, Any]) -> None:
    assert both["rotation"]["untied_head"]
    assert both["rotation"]["added_bytes"] > 0
    assert both["exponents"]["head"] != 0  # of the head that the rotation unties
    expected = changed_as_stored(open_source(model), stored_change(both))
    loaded: Any = AutoModelForCausalLM.from_pretrained(job.folder / "both")
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(loaded.get_parameter(name), expected.read(name))
