"""``lrpq compress --codes trellis``: the whole job on a tiny Llama, what its files hold and what loads them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_case import Job, file_bytes, start_pool, start_server, stored_bits, with_codes, write_model
from tiny_models import write_tiny, write_tokenizer
from torch.nn import functional
from transformers import AutoModelForCausalLM

import lrpq.loading  # noqa: F401 - makes the format known to transformers
from flows.config import CompressConfig
from flows.presets import FAST
from lrpq.checkpoint.stored import StoredCheckpoint
from lrpq.errors import ConfigError
from lrpq.kernels.trellis import round_segments
from lrpq.quant.grid import QuantizedWeight
from lrpq.quant.trellis import codebook, segment_edges

BUDGET = 3.25


@pytest.fixture(scope="module")
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job:
    start_server(request)
    return Job(start_pool(request), tmp_path_factory.mktemp("trellis-job"), scales="bfloat16")


@pytest.fixture(scope="module")
def model(job: Job) -> Path:
    return write_model(job.folder / "model", hidden=128, ffn=256)


@pytest.fixture(scope="module")
def uniform(job: Job, model: Path) -> dict[str, Any]:
    """Manifest of the same job with steps of a grid, done first: its candidates serve both."""
    return job(model, "uniform", plan__budget_bits=BUDGET)


@pytest.fixture(scope="module")
def made(job: Job, model: Path, uniform: dict[str, Any]) -> dict[str, Any]:
    """Manifest of a run with trellis codes, written to ``trellis``."""
    return job(model, "trellis", plan__budget_bits=BUDGET, plan__codes="trellis")


@pytest.fixture(scope="module")
def reused(made: dict[str, Any]) -> set[str]:
    return set(made["reused"])


def test_candidates_of_uniform_codes_serve_it(reused: set[str], made: dict[str, Any]) -> None:
    assert {"profile", "candidates"} <= reused
    assert "refine" not in reused
    assert made["guard"]["kept"] == "lrpq"
    assert made["degraded"]["modules_without_streams"] == 0
    assert "forecast" not in made  # no share was measured for these codes


def test_files_hold_symbols_within_the_budget(job: Job, made: dict[str, Any]) -> None:
    folder = job.folder / "trellis"
    bits, weights = stored_bits(folder)
    stored = StoredCheckpoint(folder)
    assert bits / weights <= BUDGET
    assert made["budget"]["reached_bits"] == pytest.approx(bits / weights, rel=1e-9)
    assert sum(module["storage_bits"] for module in made["modules"]) == bits
    kinds = {module["name"]: module["codes"] for module in made["modules"]}
    assert set(kinds.values()) <= {"trellis", "uniform"}
    assert list(kinds.values()).count("trellis") > len(kinds) // 2
    for module in made["modules"]:
        choice = stored.choice(module["name"])
        assert choice is not None
        assert choice.trellis == (module["codes"] == "trellis")
        assert choice.trellis == (choice.bits != 8)
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "lrpq"


def test_as_many_bits_have_less_divergence(made: dict[str, Any], uniform: dict[str, Any]) -> None:
    assert made["evaluation"]["lrpq"]["kl_nats"] < 0.8 * uniform["evaluation"]["lrpq"]["kl_nats"]
    assert made["evaluation"]["control"] == uniform["evaluation"]["control"]  # plain GPTQ on a grid, for both
    predicted = [found["budget"]["predicted_kl_nats"] for found in (made, uniform)]
    assert 0.25 < predicted[0] / predicted[1] < 0.7
    assert sum(module["cost_nats"] for module in made["modules"]) == pytest.approx(predicted[0], rel=1e-6)


@torch.no_grad()
def test_transformers_computes_what_the_codes_say(job: Job, model: Path, made: dict[str, Any]) -> None:
    assert made["verified"]["max_abs_difference"] == 0.0
    found: Any = AutoModelForCausalLM.from_pretrained(job.folder / "trellis")
    dense = with_codes(model, StoredCheckpoint(job.folder / "trellis"), made["modules"])
    x = torch.arange(40)[None]
    assert torch.equal(found(x).logits, dense(x).logits)


@torch.no_grad()
def test_the_codes_are_those_of_gptq_on_these_scales(job: Job, model: Path, made: dict[str, Any]) -> None:
    """Against the original the result is nearer than with streams that are found for every column by itself."""
    stored = StoredCheckpoint(job.folder / "trellis")
    original, rounded, quantized = (AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32) for _ in range(3))
    for module in made["modules"]:
        weight = stored.codes(module["name"])
        assert weight is not None
        quantized.get_submodule(module["name"]).weight.copy_(weight.dequantize())
        if weight.choice.trellis:
            rounded.get_submodule(module["name"]).weight.copy_(by_itself(original, module["name"], weight))
    x = torch.randint(0, original.config.vocab_size, (8, 48), generator=torch.Generator().manual_seed(0))
    wanted = original(x).logits.log_softmax(-1)

    def divergence(other: Any) -> float:
        return float(functional.kl_div(other(x).logits.log_softmax(-1), wanted, log_target=True, reduction="sum"))

    assert divergence(quantized) < 0.9 * divergence(rounded)


def by_itself(original: Any, name: str, weight: QuantizedWeight) -> torch.Tensor:
    """A layer's weight in streams without feedback from column to column, on the scales of its codes."""
    W = original.get_submodule(name).weight
    d_out, d_in = W.shape
    book, S = codebook(weight.choice.bits), weight.scales.T.float().contiguous()
    codes = torch.empty(d_in, d_out, dtype=torch.int8)
    runs = torch.arange(d_in) // (d_in // len(S))
    T = W.T.contiguous()
    ones, edges = torch.ones(d_out), segment_edges([d_out])
    round_segments(T.clone(), T, S, torch.eye(d_in), ones, runs, book, codes, edges, bits=weight.choice.bits)
    return replace(weight, codes=codes.T.contiguous()).dequantize()


def test_the_same_again_computes_nothing(job: Job, model: Path, made: dict[str, Any]) -> None:
    again = job(model, "trellis", plan__budget_bits=BUDGET, plan__codes="trellis", overwrite=True)
    assert again["computed_nothing"]
    assert again["content_key"] == made["content_key"]


def test_dense_weights_are_those_of_the_same_codes(job: Job, model: Path, made: dict[str, Any]) -> None:
    dense = job(model, "dense", plan__budget_bits=BUDGET, plan__codes="trellis", plan__format="dense")
    assert "refine" in dense["reused"]
    plain, packed = (StoredCheckpoint(job.folder / name) for name in ("dense", "trellis"))
    for module in made["modules"]:
        weight = packed.codes(module["name"])
        assert weight is not None
        assert torch.equal(plain.part(module["name"], "weight"), weight.dequantize(torch.bfloat16))


def test_fast_makes_a_plans_streams_on_the_original_inputs(job: Job, model: Path, made: dict[str, Any]) -> None:
    fast = {f"{path.rsplit('.', 1)[0].replace('.', '__')}__{path.rsplit('.', 1)[1]}": v for path, v in FAST.items()}
    found = job(model, "fast", plan__budget_bits=BUDGET, plan__codes="trellis", **fast)
    assert found["verified"]["max_abs_difference"] == 0.0
    assert {module["codes"] for module in found["modules"]} >= {"trellis"}
    assert found["evaluation"]["lrpq"]["kl_nats"] < found["evaluation"]["control"]["kl_nats"]


def test_experts_are_streams_too_and_compared_in_the_files(job: Job) -> None:
    asked: dict[str, Any] = {"plan__codes": "trellis", "evaluation__control": False}
    narrow = write_tiny(job.folder / "narrow-experts", "mixtral")
    write_tokenizer(narrow)
    with pytest.raises(ConfigError, match=r"--codes trellis: 16 of 24 layers.*gate_up_proj with 96 \+ 96"):
        job(narrow, "narrow", **asked)
    model = write_tiny(job.folder / "experts-model", "mixtral", intermediate_size=128)
    write_tokenizer(model)
    found = job(model, "experts", run__candidates={"bits": [2, 3, 4], "group_sizes": [32, -1]}, **asked)
    assert found["verified"]["loader"] is None
    assert "trellis" in {module["codes"] for module in found["modules"] if "experts" in module["name"]}


def test_a_budget_in_bytes_is_one_of_the_formats(job: Job, model: Path) -> None:
    """Without 8 bits every layer's widest choice is a trellis."""
    candidates = {"bits": [2, 3, 4], "group_sizes": [64], "scales": "bfloat16"}
    asked: dict[str, Any] = {"run__candidates": candidates, "plan__codes": "trellis", "evaluation__control": False}
    found = job(model, "bytes", plan__budget_bytes=290_000, **asked)
    assert 280_000 < file_bytes(job.folder / "bytes") <= 290_000
    assert {module["codes"] for module in found["modules"]} == {"trellis"}


def test_a_quantized_head_keeps_its_candidate_and_is_no_degradation(job: Job) -> None:
    model = write_model(job.folder / "untied", hidden=128, ffn=256, tied=False)
    found = job(
        model,
        "head",
        run__candidates={"bits": [3, 4], "group_sizes": [64], "scales": "bfloat16", "quantize_head": 4},
        plan__codes="trellis",
        plan__budget_bits=3.5,
        evaluation__control=False,
    )
    by_name = {module["name"]: module["codes"] for module in found["modules"]}
    assert by_name.pop("lm_head") == "uniform"
    assert set(by_name.values()) == {"trellis"}
    assert found["degraded"]["modules_without_streams"] == 0
    assert found["verified"]["max_abs_difference"] == 0.0


def test_the_smallest_checkpoint_within_a_divergence_is_found_with_streams(job: Job, model: Path) -> None:
    candidates = {"bits": [2, 3, 4, 5], "group_sizes": [64], "scales": "bfloat16", "cost_rows": 16}
    found = job(
        model, "max-kl", run__candidates=candidates, plan__codes="trellis", plan__max_kl=0.05, evaluation__control=False
    )
    assert found["budget"]["search"]["max_kl"] == 0.05
    assert found["guard"]["lrpq"]["kl_nats"] <= 0.05
    assert "trellis" in {module["codes"] for module in found["modules"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plan": {"target": "vllm"}}, r"--codes trellis with --target vllm: it has no kernels"),
        ({"plan": {"format": "gptq"}}, r"--codes trellis with --format gptq: its readers would take symbols for steps"),
        ({"plan": {"format": "compressed-tensors"}}, r"--codes trellis with --format compressed-tensors"),
        ({"plan": {"codes": "uniform", "format": "trellis"}}, r"--format trellis: is for --codes trellis"),
        ({"plan": {"refine": "stitch"}}, r"--refine stitch with --codes trellis.*with --cost-rows"),
        ({"plan": {"budget_bits": None, "max_kl": 0.1}}, r"--max-kl with --codes trellis.*with --cost-rows"),
        ({"run": {"candidates": {"bits": [8]}}, "plan": {"budget_bits": 9}}, r"--codes trellis: has 2 to 6 bits"),
        ({"run": {"images": {"source": "folder"}}}, r"--codes with --images: is for language models"),
    ],
)
def test_what_cannot_have_streams_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    document: dict[str, Any] = {
        "run": {"model": "m", **changes.get("run", {})},
        "plan": {"budget_bits": BUDGET, "codes": "trellis", **changes.get("plan", {})},
        "output": tmp_path / "out",
    }
    if document["plan"]["budget_bits"] is None:
        del document["plan"]["budget_bits"]
    with pytest.raises(ConfigError, match=message):
        CompressConfig.model_validate(document)
