"""The whole job on every supported architecture: calibrate, profile, candidates, allocate, refine, assemble, evaluate.

What the checkpoint holds is proved while it is assembled: reloaded by plain transformers, its weights are bit for bit
those of the codes and its logits those of the dense dequantized model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_case import Job, file_bytes, start_pool, start_server, stored_bits
from safetensors import safe_open
from tiny_models import CASES, write_tiny, write_tokenizer
from transformers import AutoModelForCausalLM

from lrpq.errors import ConfigError
from lrpq.model.source import open_source
from lrpq.model.streaming import BlockStream

BUDGET = 4.5
CHANGES: dict[str, Any] = {
    "plan__budget_bits": BUDGET,
    "run__candidates__group_sizes": [32],
    "evaluation__control": False,
    "run__dtype": "float32",
}
EXPERTS = {"mixtral", "qwen3-moe"}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job:
    start_server(request)
    return Job(start_pool(request), tmp_path_factory.mktemp("families"))


def written(job: Job, name: str) -> Path:
    """The model of a case with a tokenizer, written once."""
    folder = job.folder / f"{name}-model"
    if not folder.is_dir():
        write_tokenizer(write_tiny(folder, name))
    return folder


@pytest.mark.parametrize("name", CASES)
def test_the_whole_job(job: Job, name: str) -> None:
    """Two to four seconds each. Buys: no stage knows an architecture that the table does not."""
    model = written(job, name)
    changes = CHANGES | ({"run__calibration__num_windows": 12} if name in EXPERTS else {})
    manifest = job(model, f"{name}-out", **changes)
    output = job.folder / f"{name}-out"

    bits, weights = stored_bits(output)
    stream = BlockStream(open_source(model), dtype=torch.float32)
    assert weights == sum(spec.num_weights for spec in stream.specs)
    assert bits <= BUDGET * weights
    if name not in EXPERTS:  # all experts of a model share one choice, which leaves some of the budget
        assert bits > (BUDGET - 0.2) * weights
    before = file_bytes(model)
    assert before - file_bytes(output) > 0.6 * weights * CASES[name].dtype.itemsize
    assert manifest["bytes"] == {"original": before, "compressed": file_bytes(output)}
    assert manifest["verified"]["max_abs_difference"] == 0.0
    assert 0 < manifest["evaluation"]["lrpq"]["kl_nats"] < 5
    assert manifest["evaluation"]["reference"]["perplexity"] > 1
    loaded = AutoModelForCausalLM.from_pretrained(output)
    config = json.loads((output / "config.json").read_text())
    assert config["architectures"] == [type(loaded).__name__]
    with torch.no_grad():
        assert torch.isfinite(loaded(torch.arange(8, 30)[None]).logits).all()


def test_what_is_not_quantized_is_carried_through_untouched(job: Job) -> None:
    """The vision tower of a multimodal wrapper, routers, norms and embeddings: same names, same bytes."""
    for name in ("gemma3-multimodal", "mixtral"):
        model, output = written(job, name), job.folder / f"{name}-out"
        if not output.exists():
            job(model, f"{name}-out", **CHANGES, run__calibration__num_windows=12)
        quantized = {tensor for s in BlockStream(open_source(model), dtype=torch.float32).specs for tensor in s.stored}
        before, after = tensors(model), tensors(output)
        carried = set(before) - quantized
        assert carried
        for tensor in carried:
            assert torch.equal(before[tensor], after[tensor])
        assert {n.rsplit(".", 1)[0] for n in after if n.endswith("weight_packed")} == {
            n.removesuffix(".weight") for n in quantized
        }


def test_dense_experts_beside_packed_layers_are_refused_before_anything_is_computed(job: Job) -> None:
    """transformers would not load them; as dense weights they may stay as they are."""
    model = written(job, "mixtral")
    keep = {"plan__keep": ["*.experts.*=16"], "run__calibration__num_windows": 12}
    with pytest.raises(ConfigError, match=r"experts\.0\.\w+: left at 16 bits, but transformers loads no dense experts"):
        job(model, "mixtral-keep", **CHANGES, **keep)
    assert "profile" not in job.progress.stages
    manifest = job(model, "mixtral-keep", **CHANGES, **keep, plan__format="dense")
    assert {m["bits"] for m in manifest["modules"] if "experts" in m["name"]} == {16}


def test_a_keep_rule_for_one_expert_says_that_it_binds_them_all(job: Job) -> None:
    keep = {"plan__keep": ["model.layers.1.mlp.experts.3.*=5"], "run__calibration__num_windows": 12}
    manifest = job(written(job, "mixtral"), "mixtral-one", **(CHANGES | keep | {"plan__budget_bits": 6.0}))
    assert {m["bits"] for m in manifest["modules"] if "experts" in m["name"]} == {5}
    assert any("also binds 14 modules" in warning for warning in manifest["warnings"])


@pytest.mark.parametrize("name", ["llama", "gemma3-multimodal"])
def test_dense_weights_run_without_any_loader(job: Job, name: str) -> None:
    """Same codes as the packed checkpoint's, as bfloat16 under the original names."""
    model, packed = written(job, name), job.folder / f"{name}-out"
    if not packed.exists():
        job(model, f"{name}-out", **CHANGES)
    manifest = job(model, f"{name}-dense", **CHANGES, plan__format="dense")
    assert {"profile", "candidates", "refine"} <= set(manifest["reused"])
    output = job.folder / f"{name}-dense"
    assert "quantization_config" not in json.loads((output / "config.json").read_text())
    assert set(tensors(output)) == set(tensors(model))
    ids = torch.arange(8, 30)[None]
    with torch.no_grad():
        dense, own = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)(ids).logits
            for folder in (output, packed)
        )
    assert torch.equal(dense, own)


def test_gptq_format_keeps_to_the_widths_of_its_kernels(job: Job) -> None:
    """5 and 6 bits are no choices, zero points and column groups are counted in the budget."""
    model = written(job, "llama")
    manifest = job(model, "llama-gptq", **CHANGES, plan__format="gptq", run__candidates__scales="bfloat16")
    assert {module["bits"] for module in manifest["modules"]} <= {2, 3, 4, 8}
    assert BUDGET - 0.3 < manifest["budget"]["reached_bits"] <= BUDGET
    config = json.loads((job.folder / "llama-gptq" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["sym"], config["desc_act"]) == ("gptq", True, False)
    found = tensors(job.folder / "llama-gptq")
    bits = 8 * sum(
        t.numel() * t.element_size()
        for name, t in found.items()
        if name.endswith((".qweight", ".qzeros", ".scales", ".g_idx"))
    )
    weights = sum(module["num_weights"] for module in manifest["modules"])
    assert bits / weights == pytest.approx(manifest["budget"]["reached_bits"], abs=1e-9)
    assert 0 < manifest["evaluation"]["lrpq"]["kl_nats"] < 5


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    return found
