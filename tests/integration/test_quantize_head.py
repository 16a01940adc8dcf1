"""--quantize-head, --quantize-embeddings: what transformers loads, what is refused, and the whole job with a head."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_llama
from pipeline_case import Job, contents, file_bytes, start_pool, start_server, stored_bits, write_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import CASES, write_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from flows import cli
from flows.compress import run_reallocate
from flows.config import ClusterConfig, EvaluationConfig, PlanConfig
from lrpq.allocate.parts import NOT_LOADED, OPTIONS, Part
from lrpq.allocate.targets import Target
from lrpq.checkpoint.assemble import write_checkpoint
from lrpq.checkpoint.verify import verify_checkpoint
from lrpq.errors import ConfigError
from lrpq.model.layers import HEAD, Choice
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.source import open_source
from lrpq.model.streaming import BlockStream
from lrpq.quant.gptq import loss
from lrpq.quant.grid import Grid
from lrpq.quant.hessian import HessianSum, normalized
from lrpq.quant.packing import pack, unpack
from lrpq.quant.rtn import round_to_nearest
from tasks.calibration.pydoc import pydoc_documents
from tasks.store.manifest import read_manifest
from tasks.store.objects import ObjectStore
from tasks.store.opened import open_store
from tasks.store.symmetric import read_symmetric
from tasks.store.tensors import read_tensors

# --- what plain transformers loads ----------------------------------------------------------------

CHOICE = Choice(bits=4, group_size=32)
LOADING_ERRORS = (AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)


def loads_packed(folder: Path, module: str, *, tied: bool) -> bool:
    """Whether ``from_pretrained`` gives a model with one packed module its exact weight."""
    write_llama(folder, layers=1, tied=tied)
    tensors = load_file(folder / "model.safetensors")
    original = tensors.pop(f"{module}.weight", tensors.get("model.embed_tokens.weight"))
    assert original is not None
    quantized = round_to_nearest(original, CHOICE)
    tensors |= {f"{module}.{name}": values for name, values in pack(quantized).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": [f"re:^{module}$"], "weights": weights}},
    }
    (folder / "config.json").write_text(json.dumps(config))
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
        model(torch.arange(8)[None])
        loaded = model.get_submodule(module).weight.detach()
    except LOADING_ERRORS:
        return False
    return torch.equal(loaded, quantized.dequantize(loaded.dtype))


@pytest.mark.parametrize(
    ("part", "module", "tied"),
    [
        (Part.HEAD, "lm_head", False),
        (Part.TIED_HEAD, "lm_head", True),
        (Part.TIED_HEAD, "model.embed_tokens", True),
        (Part.EMBEDDINGS, "model.embed_tokens", False),
    ],
)
def test_the_table_is_what_plain_transformers_loads(part: Part, module: str, tied: bool, tmp_path: Path) -> None:
    """Where this fails because more is loaded than before, update lrpq.allocate.parts."""
    assert loads_packed(tmp_path, module, tied=tied) == (part not in NOT_LOADED[Target.TRANSFORMERS])


@pytest.mark.parametrize("name", CASES)
def test_a_packed_head_of_every_architecture(name: str, tmp_path: Path) -> None:
    source = open_source(write_tiny(tmp_path / "model", name, tie_word_embeddings=False))
    stream = BlockStream(source, dtype=torch.float32)
    assert stream.head_spec is not None
    specs = {spec.name: spec for spec in (*stream.specs, stream.head_spec)}
    choices = dict.fromkeys(specs, CHOICE)
    shared: Mapping[str, Any] = {
        "quantized": lambda name: round_to_nearest(stream.weight(specs[name]), CHOICE),
        "choices": choices,
        "specs": tuple(specs.values()),
    }
    write_checkpoint(source, tmp_path / "out", manifest={}, **shared)
    found = verify_checkpoint(tmp_path / "out", source, **shared)
    assert found.num_modules == len(specs)
    assert found.max_abs_difference == 0.0
    assert f"{stream.head_spec.stored[0]}" not in tensors_of(tmp_path / "out")
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert not [entry for entry in ignored if "lm_head" in entry or "embed_out" in entry]


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tied", "options", "expected"),
    [
        (False, ["--quantize-embeddings", "8"], "--quantize-embeddings with --target transformers: transformers 5.23"),
        (True, ["--quantize-embeddings", "8"], "--quantize-embeddings with --target transformers: transformers 5.23"),
        (True, ["--quantize-head", "8"], "--quantize-head with --target transformers: the head shares its weight"),
        (False, ["--quantize-head", "8", "--target", "vllm"], "or give --target transformers"),
        (True, ["--quantize-head", "8", "--target", "vllm"], "--quantize-head with --target vllm"),
        (False, ["--quantize-embeddings", "8", "--target", "vllm"], "--quantize-embeddings with --target vllm"),
        (False, ["--quantize-head", "8", "--format", "gptq"], "--quantize-head with --format gptq"),
        (False, ["--quantize-head", "7"], "--quantize-head: 7 is not one of 2, 3, 4, 5, 6, 8"),
        (False, ["--quantize-head", "8", "--bits", "8", "--budget", "7.9"], "the smallest possible is 8 bits"),
    ],
)
def test_what_no_loader_reads_is_refused_in_one_line_and_nothing_is_written(
    tied: bool,
    options: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = write_llama(tmp_path / "model", layers=1, tied=tied)
    texts = ["--calibration", "pydoc:calibrate", "--length", "64", "--evaluation-length", "64"]
    folders = ["--output", str(tmp_path / "out"), "--store", str(tmp_path / "store")]
    capfd.readouterr()
    assert cli.run(["compress", str(model), "--budget", "4", *texts, *folders, *options]) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: ")
    assert expected in captured.err
    assert not (tmp_path / "out").exists()
    assert not [path for path in (tmp_path / "store").rglob("*") if path.is_file()]


def test_every_reason_is_told_with_its_option_and_what_to_do() -> None:
    for target, reasons in NOT_LOADED.items():
        for part in reasons:
            assert OPTIONS[part].startswith("--quantize-")
        assert Part.EMBEDDINGS in reasons, f"{target.value} loads packed embeddings: the option can be implemented"


# --- the whole job --------------------------------------------------------------------------------

LAYERS, WIDTH, VOCABULARY, BITS = 2, 128, 320, 3
BLOCK_WEIGHTS = LAYERS * (128 * 128 * 2 + 2 * 64 * 128 + 3 * 192 * 128)
HEAD_WEIGHTS = VOCABULARY * WIDTH
BUDGET = 3.5


@pytest.fixture(scope="module")
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job:
    start_server(request)
    return Job(start_pool(request), tmp_path_factory.mktemp("quantize-head"), scales="bfloat16")


@pytest.fixture(scope="module")
def model(job: Job) -> Path:
    return write_model(job.folder / "model", bos=True, layers=LAYERS)


@pytest.fixture(scope="module")
def first(job: Job, model: Path) -> dict[str, Any]:
    """Manifest of a run with a head of three bits, written to ``first``."""
    return job(model, "first", run__candidates__quantize_head=BITS)


def reallocate(job: Job, first: dict[str, Any], output: str, **plan: Any) -> dict[str, Any]:
    with job.sharing() as progress:
        return run_reallocate(
            store=str(job.folder / "store"),
            run_id=first["run_id"],
            plan=PlanConfig.model_validate(plan),
            evaluation=EvaluationConfig(enabled=False),
            cluster=ClusterConfig(workers=2, device="cpu"),
            output=job.folder / output,
            overwrite=False,
            progress=progress,
        )


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    return found


def head_of(folder: Path) -> dict[str, Tensor]:
    return {name: values for name, values in tensors_of(folder).items() if name.startswith("lm_head.")}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(values, b[name]) for name, values in a.items())


def stage(job: Job, first: dict[str, Any], name: str, **inputs: Any) -> tuple[ObjectStore, str]:
    """The store, and the folder of the run's stage whose manifest names these inputs."""
    store = open_store(str(job.folder / "store"))
    prefixes = [f"{first['run_id']}/{name}/{key}" for key in store.folders(f"{first['run_id']}/{name}")]
    (prefix,) = [p for p in prefixes if inputs.keys() <= read_manifest(store, f"{p}/manifest.json").inputs.keys()]
    return store, prefix


def test_the_budget_counts_the_head_and_is_met_by_the_file(job: Job, first: dict[str, Any]) -> None:
    bits, weights = stored_bits(job.folder / "first")
    assert weights == BLOCK_WEIGHTS + HEAD_WEIGHTS
    assert BUDGET - 0.05 <= bits / weights <= BUDGET
    assert first["budget"]["reached_bits"] == bits / weights
    head = first["modules"][-1]
    assert (head["name"], head["kind"], head["block"]) == ("lm_head", "lm_head", LAYERS)
    assert (head["bits"], head["group_size"], head["num_weights"]) == (BITS, 64, HEAD_WEIGHTS)
    assert head["storage_bits"] == HEAD_WEIGHTS * (BITS + 16 / 64)
    assert sum(module["storage_bits"] for module in first["modules"]) == bits
    assert head["cost_nats"] > 0
    assert first["budget"]["predicted_kl_nats"] == pytest.approx(sum(m["cost_nats"] for m in first["modules"]))
    # what the head leaves over goes to the blocks
    assert len({module["bits"] for module in first["modules"]}) > 1


def test_the_file_is_smaller_than_without(job: Job, first: dict[str, Any], model: Path) -> None:
    without = job(model, "without", evaluation__enabled=False, plan__refine="stitch")
    assert without["run_id"] != first["run_id"]
    assert "lm_head.weight" in tensors_of(job.folder / "without")
    saved = file_bytes(job.folder / "without") - file_bytes(job.folder / "first")
    assert 0.95 < saved / (HEAD_WEIGHTS * (16 - BUDGET) / 8) < 1.1
    store, prefix = stage(job, without, "profile")
    assert not store.exists(f"{prefix}/hessians-{LAYERS:03d}.parquet")  # a run without it does not pay for it


def test_transformers_reloads_it_and_measures_what_the_manifest_says(
    job: Job, first: dict[str, Any], model: Path
) -> None:
    """The checkpoint, and the control with the same head in front of the original."""
    store, prefix = stage(job, first, "refine", windows=True)
    original, control = (AutoModelForCausalLM.from_pretrained(model).eval() for _ in range(2))
    modules = {name: Choice(bits=3, group_size=64) for name in (m["name"] for m in first["modules"])}
    assert first["evaluation"]["control"]["label"] == "uniform GPTQ 3b/g64"
    head = head_of(job.folder / "first")
    for name, choice in modules.items():
        codes = (
            {key.removeprefix("lm_head."): values for key, values in head.items()}
            if name == "lm_head"
            else read_tensors(store, f"{prefix}/{name}.safetensors")
        )
        control.get_submodule(name).weight.data = unpack(codes, choice).dequantize(torch.bfloat16)
    checkpoint: Any = AutoModelForCausalLM.from_pretrained(job.folder / "first").eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer("\n\n".join(pydoc_documents("evaluate")), add_special_tokens=False, verbose=False).input_ids
    n, length = 4, 48
    stride = (len(ids) // length) // n
    for name, variant in (("lrpq", checkpoint), ("control", control)):
        kl = 0.0
        for i in range(n):
            x = torch.tensor([[1, *ids[i * stride * length : (i * stride + 1) * length - 1]]])
            with torch.no_grad():
                r, q = (m(x).logits[0, :-1].float().log_softmax(-1) for m in (original, variant))
            kl += (r.exp() * (r - q)).sum(-1).mean().item() / n
        assert first["evaluation"][name]["kl_nats"] == pytest.approx(kl, rel=1e-3)
    assert torch.equal(checkpoint.lm_head.weight, control.lm_head.weight)
    assert not torch.equal(checkpoint.lm_head.weight, original.lm_head.weight)
    config = json.loads((job.folder / "first" / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == []


def test_gptq_makes_a_better_head_than_rounding(job: Job, first: dict[str, Any], model: Path) -> None:
    store, prefix = stage(job, first, "profile")
    xx, scalars = read_symmetric(store, f"{prefix}/hessians-{LAYERS:03d}.parquet", HEAD)
    assert scalars["weight_sum"] == scalars["num_tokens"] == 6 * 48
    H = normalized(HessianSum(xx=xx, weight_sum=scalars["weight_sum"], num_tokens=6 * 48))
    W = ModelSource(model).read("lm_head.weight").float()
    choice = Choice(bits=BITS, group_size=64)
    packed = {name.removeprefix("lm_head."): values for name, values in head_of(job.folder / "first").items()}
    nearest = round_to_nearest(W, choice, importance=H.diagonal(), grid=Grid.SIGNED)
    found, rounded = (float(loss(W, q.dequantize(), H).sum()) for q in (unpack(packed, choice), nearest))
    assert found < 0.9 * rounded


def test_the_same_again_computes_nothing(job: Job, first: dict[str, Any], model: Path) -> None:
    again = job(model, "first", run__candidates__quantize_head=BITS)
    assert again["computed_nothing"]
    assert again["evaluation"] == first["evaluation"]


def test_another_budget_keeps_the_head(job: Job, first: dict[str, Any]) -> None:
    head = head_of(job.folder / "first")
    for refine in ("sequential", "stitch"):
        reallocate(job, first, refine, budget_bits=4.5, refine=refine)
        assert {"profile", "candidates"} <= set(job.progress.reused)
        bits, weights = stored_bits(job.folder / refine)
        assert weights == BLOCK_WEIGHTS + HEAD_WEIGHTS
        assert 4.4 <= bits / weights <= 4.5
        assert same(head_of(job.folder / refine), head)
    assert contents(job.folder / "sequential") != contents(job.folder / "stitch")


def test_a_budget_in_bytes_counts_it_too(job: Job, first: dict[str, Any]) -> None:
    total = file_bytes(job.folder / "first") + 5000
    found = reallocate(job, first, "bytes", budget_bytes=total, refine="stitch")
    reached = file_bytes(job.folder / "bytes")
    assert total - 2500 < reached <= total
    assert found["budget"]["reached_bytes"] == reached
    assert same(head_of(job.folder / "bytes"), head_of(job.folder / "first"))


def test_the_dense_format_holds_the_dequantized_head(job: Job, first: dict[str, Any]) -> None:
    reallocate(job, first, "dense", budget_bits=4.5, refine="stitch", format="dense")
    packed = {name.removeprefix("lm_head."): values for name, values in head_of(job.folder / "first").items()}
    expected = unpack(packed, Choice(bits=BITS, group_size=64)).dequantize(torch.bfloat16)
    assert same(head_of(job.folder / "dense"), {"lm_head.weight": expected})


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        ({"keep": ["lm_head=8"]}, "keep rule 'lm_head=8' matches no module"),
        ({"keep": ["*=16"]}, "no module may be quantized"),
        ({"target": "vllm"}, "--quantize-head with --target vllm"),
        ({"budget_bits": 2.2}, "the smallest possible is"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_before_anything_is_computed(
    job: Job, first: dict[str, Any], plan: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        reallocate(job, first, "refused", **{"budget_bits": 4.0, **plan})
    assert job.progress.stages == []
    assert not (job.folder / "refused").exists()


def test_rules_for_all_modules_leave_the_head_alone(job: Job, first: dict[str, Any]) -> None:
    found = reallocate(job, first, "kept", budget_bits=8.0, keep=["*=8"], refine="stitch")
    assert {module["name"]: module["bits"] for module in found["modules"]}["lm_head"] == BITS
    assert {module["bits"] for module in found["modules"][:-1]} == {8}
