"""``lrpq compress --rotate hadamard``: the whole job on a tiny tied Llama, and what reads its checkpoint then."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_case import WORKERS, Job, contents, file_bytes, start_pool, start_server, write_model
from tiny_models import VOCABULARY, write_tiny, write_tokenizer
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

import flows.compress
from flows import cli
from flows.changes import stored_change
from flows.closing import rotation_line
from lrpq.errors import RunMismatch
from lrpq.model.source import open_source
from lrpq.transform.changed import changed_as_stored
from tasks.calibration.pydoc import pydoc_documents
from tasks.cluster import Pool

HIDDEN = 128
EMBEDDING_BYTES = 2 * VOCABULARY * HIDDEN
WINDOWS, LENGTH = 4, 48


@pytest.fixture(scope="module")
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job:
    start_server(request)
    return Job(start_pool(request), tmp_path_factory.mktemp("rotate-job"))


@pytest.fixture(scope="module")
def model(job: Job) -> Path:
    """bf16, tied, sharded."""
    return write_model(job.folder / "model", hidden=HIDDEN, tied=True, max_shard_size="150KB")


@pytest.fixture(scope="module")
def rotated(job: Job, model: Path) -> dict[str, Any]:
    """Manifest of the rotated run, written to ``rotated``."""
    return job(model, "rotated", run__rotate="hadamard", run_id="rotated")


@pytest.fixture(scope="module")
def plain(job: Job, model: Path) -> dict[str, Any]:
    """The same without the rotation."""
    return job(model, "plain", plan__refine="stitch", evaluation__control=False)


@pytest.fixture
def shared(job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """``lrpq evaluate`` runs on the session's pool."""

    @contextmanager
    def open_shared(**_: object) -> Iterator[Pool]:
        yield job.pool

    monkeypatch.setattr(flows.compress, "open_pool", open_shared)
    monkeypatch.setenv("LRPQ_STORE", str(tmp_path / "store"))


def command(job: Job, capfd: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> Any:
    """A command's document; of one that fails, its lines on stderr."""
    capfd.readouterr()
    with job.sharing():
        assert cli.run([str(argument) for argument in arguments]) == code
    captured = capfd.readouterr()
    return json.loads(captured.out) if code == 0 else captured.err.splitlines()


def test_manifest_says_what_was_done(job: Job, model: Path, rotated: dict[str, Any], plain: dict[str, Any]) -> None:
    assert rotated["rotation"] == {
        "kind": "hadamard",
        "scope": "residual_and_values",
        "seed": 0,
        "untied_head": True,
        "added_bytes": EMBEDDING_BYTES,
    }
    assert plain["rotation"] is None
    assert rotated["configuration"]["run"]["rotate"] == "hadamard"
    assert rotated["bytes"] == {"original": file_bytes(model), "compressed": file_bytes(job.folder / "rotated")}
    line = rotation_line(rotated["rotation"])
    assert line.endswith("the head, tied before, is stored beside the embedding: 81.92 kB more")
    assert rotated["verified"]["max_abs_difference"] == 0.0
    # the head comes on top; all else is of one size but for headers and what the two plans leave over
    more = rotated["budget"]["reached_bytes"] - plain["budget"]["reached_bytes"]
    assert 0.95 * EMBEDDING_BYTES < more < 1.05 * EMBEDDING_BYTES
    assert rotated["budget"]["reached_bits"] <= 3.5


@torch.no_grad()
def test_plain_transformers_loads_it_and_measures_what_the_manifest_says(
    job: Job, model: Path, rotated: dict[str, Any], plain: dict[str, Any]
) -> None:
    folder = job.folder / "rotated"
    found: Any = AutoModelForCausalLM.from_pretrained(folder)
    reference: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    assert found.dtype is torch.bfloat16
    assert found.config.tie_word_embeddings is False
    assert reference.config.tie_word_embeddings is True
    assert not torch.equal(found.lm_head.weight, found.model.embed_tokens.weight)
    stored = changed_as_stored(open_source(model), stored_change(rotated))
    assert torch.equal(found.lm_head.weight, stored.read("lm_head.weight"))
    assert torch.equal(found.model.embed_tokens.weight, stored.read("model.embed_tokens.weight"))
    ids = AutoTokenizer.from_pretrained(folder)(
        "\n\n".join(pydoc_documents("evaluate")), add_special_tokens=False, verbose=False
    ).input_ids
    stride = (len(ids) // LENGTH) // WINDOWS
    nll, kls = 0.0, []
    for i in range(WINDOWS):
        x = torch.tensor([ids[i * stride * LENGTH :][:LENGTH]])
        r, q = (m(x).logits[0, :-1].float().log_softmax(-1) for m in (reference, found))
        nll += functional.nll_loss(r, x[0, 1:]).item() / WINDOWS
        kls.append((r.exp() * (r - q)).sum(-1).mean().item())
    measured = rotated["evaluation"]
    # against the original itself, not against its rotation
    assert measured["reference"] == plain["evaluation"]["reference"]
    assert measured["reference"]["perplexity"] == pytest.approx(math.exp(nll), rel=1e-3)
    assert measured["lrpq"]["kl_nats"] == pytest.approx(sum(kls) / WINDOWS, rel=2e-2)
    assert 0 < measured["lrpq"]["kl_nats"] < measured["control"]["kl_nats"]
    assert math.isfinite(measured["control"]["kl_nats"])


def test_the_same_again_computes_nothing(job: Job, model: Path, rotated: dict[str, Any]) -> None:
    again = job(model, "elsewhere", run__rotate="hadamard", run_id="rotated")
    assert again["computed_nothing"]
    assert contents(job.folder / "elsewhere") == contents(job.folder / "rotated")


def test_a_run_that_is_not_rotated_is_another(job: Job, model: Path, rotated: dict[str, Any]) -> None:
    with pytest.raises(RunMismatch, match='rotate: stored "hadamard", asked "none"'):
        job(model, "other", run_id="rotated")


def test_a_budget_in_bytes_counts_the_untied_head(job: Job, model: Path, rotated: dict[str, Any]) -> None:
    limit = rotated["budget"]["reached_bytes"] - 5_000
    asked = {"run__rotate": "hadamard", "run_id": "rotated", "plan__refine": "stitch", "evaluation__enabled": False}
    found = job(model, "bytes", plan__budget_bytes=limit, **asked)
    assert found["budget"]["reached_bytes"] == file_bytes(job.folder / "bytes") <= limit
    assert found["budget"]["reached_bytes"] > limit - 3_000
    assert "profile" in found["reused"]


def test_the_untied_head_can_be_quantized(job: Job, model: Path, plain: dict[str, Any]) -> None:
    asked = {"run__rotate": "hadamard", "plan__refine": "stitch", "evaluation__control": False}
    found = job(model, "head", run__candidates__quantize_head=8, plan__budget_bits=5.0, **asked)
    loaded: Any = AutoModelForCausalLM.from_pretrained(job.folder / "head")
    assert torch.isfinite(loaded(torch.arange(20)[None]).logits).all()
    assert "lm_head" in {module["name"] for module in found["modules"]}
    assert 0 < found["evaluation"]["lrpq"]["kl_nats"] < 1
    assert found["evaluation"]["reference"] == plain["evaluation"]["reference"]


@pytest.mark.usefixtures("shared")
def test_evaluate_measures_the_same(
    job: Job, model: Path, rotated: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    questions = [{"ctx": "The value ", "choices": ["of a", "in the"], "label": i % 2} for i in range(4)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    found = command(
        job,
        capfd,
        *("evaluate", job.folder / "rotated", "--reference", model, "--evaluation", "pydoc:evaluate"),
        *("--evaluation-windows", WINDOWS, "--evaluation-length", LENGTH, "--tasks", tmp_path / "q.jsonl", "--json"),
    )
    measured = rotated["evaluation"]
    assert found["evaluation"]["reference"] == measured["reference"]
    assert found["evaluation"]["checkpoint"] == measured["lrpq"]
    assert found["tasks"]["q"]["questions"] == 4


@pytest.mark.usefixtures("shared")
def test_evaluate_refuses_another_original(
    job: Job, rotated: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = write_model(tmp_path / "other", hidden=HIDDEN, tied=True, seed=1)
    lines = command(
        job,
        capfd,
        *("evaluate", job.folder / "rotated", "--reference", other, "--evaluation", "pydoc:evaluate"),
        *("--evaluation-windows", WINDOWS, "--evaluation-length", LENGTH, "--json"),
        code=2,
    )
    assert "give the model that the checkpoint was made from" in lines[-1]


def test_what_cannot_be_rotated_is_refused_before_any_work(
    job: Job, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = write_tiny(tmp_path / "model", "gemma2")
    write_tokenizer(model)
    lines = command(
        job,
        capfd,
        *("compress", model, "--budget", 3.5, "--rotate", "hadamard", "--output", tmp_path / "out"),
        *("--store", tmp_path / "store", "--calibration", "pydoc:calibrate", "--length", 48),
        *("--evaluation-length", 48, "--workers", WORKERS, "--device", "cpu"),
        code=2,
    )
    assert len(lines) == 1
    assert lines[0].startswith(f"error: model {model}: Gemma2ForCausalLM cannot be rotated: ")
    assert not (tmp_path / "out").exists()
    assert not [path for path in (tmp_path / "store").rglob("*") if path.is_file() and "run.json" in path.name]
    lines = command(
        job, capfd, "compress", model, "--budget", 3.5, "--rotate", "spin", "--output", tmp_path / "out", code=2
    )
    assert "--rotate" in lines[0]


def test_plan_counts_the_untied_head(job: Job, model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    asked = ("plan", model / "config.json", "--gpus", 1, "--length", 48, "--evaluation-length", 48, "--json")
    before = command(job, capfd, *asked)
    after = command(job, capfd, *asked, "--rotate", "hadamard")
    assert 0 <= after["checkpoint_bytes"] - before["checkpoint_bytes"] - EMBEDDING_BYTES < 200  # of headers
    assert any("rotation" in text for text in after["assumptions"])
    assert not any("rotation" in text for text in before["assumptions"])
