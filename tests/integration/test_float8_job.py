"""``lrpq compress --scales float8``: the whole job on a tiny Llama, what its files hold and what loads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_case import WORKERS, Job, start_pool, start_server, stored_bits, with_codes, write_model
from safetensors import safe_open
from tiny_models import write_tiny, write_tokenizer
from torch.nn import functional
from transformers import AutoModelForCausalLM

from flows.changes import stored_change
from flows.config import CompressConfig
from lrpq.checkpoint.stored import StoredCheckpoint
from lrpq.errors import ConfigError
from lrpq.model.source import open_source
from lrpq.transform.exponents import exponents_plan
from lrpq.transform.writing import write_folded

BUDGET = 3.25


@pytest.fixture(scope="module")
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job:
    start_server(request)
    return Job(start_pool(request), tmp_path_factory.mktemp("float8-job"))


@pytest.fixture(scope="module")
def model(job: Job) -> Path:
    return write_model(job.folder / "model")


@pytest.fixture(scope="module")
def made(job: Job, model: Path) -> dict[str, Any]:
    """Manifest of a run of a bfloat16 Llama by default, written to ``float8``."""
    candidates = {"bits": [2, 3, 4, 5, 6, 8]}
    return job(model, "float8", run__candidates=candidates, plan__budget_bits=BUDGET)


@pytest.fixture(scope="module")
def scaled(job: Job, model: Path, made: dict[str, Any]) -> Path:
    """The original with the powers of two of the run, written as an ordinary model."""
    exponents = stored_change(made).exponents
    assert exponents is not None
    source = open_source(model)
    write_folded(source, job.folder / "scaled", exponents_plan(source, exponents))
    return job.folder / "scaled"


def test_files_hold_float8_scales_within_the_budget(job: Job, made: dict[str, Any]) -> None:
    folder = job.folder / "float8"
    bits, weights = stored_bits(folder)
    assert bits / weights <= BUDGET
    assert made["budget"]["reached_bits"] == pytest.approx(bits / weights, rel=1e-9)
    by_name = {module["name"]: module for module in made["modules"]}
    assert {(m["group_size"], m["scale_bits"]) for m in by_name.values()} <= {(64, 8), (-1, 16)}
    grouped = 0
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        for name, module in by_name.items():
            scales = file.get_tensor(f"{name}.weight_scale")
            assert scales.dtype is (torch.float8_e4m3fn if module["group_size"] == 64 else torch.bfloat16)
            grouped += module["group_size"] == 64
    assert grouped
    groups = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"].values()
    float8 = [group["weights"].get("scale_dtype") == "torch.float8_e4m3fn" for group in groups]
    assert float8 == [group["weights"]["group_size"] == 64 for group in groups]


@torch.no_grad()
def test_plain_transformers_computes_what_the_codes_say(job: Job, scaled: Path, made: dict[str, Any]) -> None:
    assert made["verified"]["max_abs_difference"] == 0.0
    found: Any = AutoModelForCausalLM.from_pretrained(job.folder / "float8")
    dense = with_codes(scaled, StoredCheckpoint(job.folder / "float8"), made["modules"])
    x = torch.arange(40)[None]
    assert torch.equal(found(x).logits, dense(x).logits)


@torch.no_grad()
def test_the_codes_are_those_of_gptq_on_these_scales(job: Job, model: Path, scaled: Path, made: dict[str, Any]) -> None:
    """Against the original the result is nearer than every code rounded by itself on the same scales."""
    stored = StoredCheckpoint(job.folder / "float8")
    original: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    rounded: Any = AutoModelForCausalLM.from_pretrained(scaled, dtype=torch.float32)
    quantized: Any = AutoModelForCausalLM.from_pretrained(scaled, dtype=torch.float32)
    for module in made["modules"]:
        weight = stored.codes(module["name"])
        assert weight is not None
        quantized.get_submodule(module["name"]).weight.copy_(weight.dequantize())
        W = rounded.get_submodule(module["name"]).weight
        s = weight.scales.float().repeat_interleave(W.shape[1] // weight.scales.shape[1], dim=1)
        top = 2 ** (weight.choice.bits - 1)
        W.copy_((W / s).round().clamp(-top, top - 1) * s)
    x = torch.randint(0, original.config.vocab_size, (8, 48), generator=torch.Generator().manual_seed(0))
    wanted = original(x).logits.log_softmax(-1)

    def divergence(other: Any) -> float:
        return float(functional.kl_div(other(x).logits.log_softmax(-1), wanted, log_target=True, reduction="sum"))

    assert divergence(quantized) < divergence(rounded)


def test_evaluate_and_reallocate_read_what_was_made(job: Job, model: Path, made: dict[str, Any]) -> None:
    again = job(
        model,
        "wider",
        run__candidates={"bits": [2, 3, 4, 5, 6, 8]},
        plan__budget_bits=4.25,
        plan__refine="stitch",
    )
    assert {"profile", "candidates"} <= set(again["reused"])
    assert stored_bits(job.folder / "wider")[0] > stored_bits(job.folder / "float8")[0]
    assert again["evaluation"]["lrpq"]["kl_nats"] < made["evaluation"]["lrpq"]["kl_nats"]


def test_packed_experts_do_not_load_with_float8_scales_and_dense_ones_do(job: Job, tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "experts", "mixtral")
    write_tokenizer(model)
    asked = {"run__candidates": {"bits": [3, 4], "scales": "float8"}, "plan__refine": "stitch"}
    with pytest.raises(ConfigError, match=r"--scales float8 for a mixture of experts.*--format dense"):
        job(model, "experts", **asked)
    made = job(model, "experts", plan__format="dense", evaluation__control=False, **asked)
    assert made["verified"]["max_abs_difference"] == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"plan": {"budget_bits": 4.5, "target": "vllm"}},
            "--target vllm: its kernels read scales of 16 bits, and this run.s are float8",
        ),
        (
            {"plan": {"budget_bits": 4.5, "format": "gptq"}},
            "--format gptq: it has scales of 16 bits, and this run.s are float8",
        ),
        ({"candidates": {"group_sizes": [-1]}}, "--scales float8 with --group-size channel"),
        ({"images": {"source": "folder"}}, "--scales"),
    ],
)
def test_what_reads_no_float8_scales_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    run = {"model": "m", "candidates": {"scales": "float8", **changes.get("candidates", {})}}
    run |= {"images": changes["images"]} if "images" in changes else {}
    document = {
        "run": run,
        "plan": changes.get("plan", {"budget_bits": 4.5}),
        "cluster": {"workers": WORKERS},
        "output": tmp_path / "out",
        "store": str(tmp_path / "store"),
    }
    with pytest.raises(ConfigError, match=message):
        CompressConfig.model_validate(document)
