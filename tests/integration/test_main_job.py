"""The main job on tiny models, all stages real: what is written, what it measures, what is found again in the store."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_case import (
    Job,
    contents,
    file_bytes,
    snapshot,
    start_pool,
    start_server,
    stored_bits,
    write_model,
)
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from flows.compress import run_reallocate
from flows.config import ClusterConfig, EvaluationConfig, PlanConfig
from lrpq.errors import BudgetError, ConfigError
from lrpq.model.layers import Choice
from lrpq.quant.packing import storage_bits
from tasks.calibration.pydoc import pydoc_documents

LAYERS = 4


@pytest.fixture(scope="module")
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job:
    start_server(request)
    return Job(start_pool(request), tmp_path_factory.mktemp("main-job"))


@pytest.fixture(scope="module")
def model(job: Job) -> Path:
    """bf16, untied, sharded, with a tokenizer that adds BOS."""
    return write_model(job.folder / "model", bos=True, layers=LAYERS, max_shard_size="300KB")


@pytest.fixture(scope="module")
def first(job: Job, model: Path) -> dict[str, Any]:
    """Manifest of the first run, written to ``first``."""
    return job(model, "first")


def choices_of(manifest: dict[str, Any]) -> dict[str, tuple[int, int | None]]:
    return {module["name"]: (module["bits"], module["group_size"]) for module in manifest["modules"]}


def packed(folder: Path, module: str) -> Tensor:
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            if f"{module}.weight_packed" in file.keys():  # noqa: SIM118 - not a mapping
                found: Tensor = file.get_tensor(f"{module}.weight_packed")
                return found
    raise AssertionError(f"{module} has no codes in {folder}")


def smallest_upgrade(manifest: dict[str, Any], widths: dict[str, int], *, bits: tuple[int, ...]) -> int:
    """Fewest bits that any fused group would need for its next wider choice: more than is left over, if exact."""
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    sites = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
    for module in manifest["modules"]:
        if module["bits"] < 16:
            groups.setdefault((module["block"], sites.get(module["kind"], module["kind"])), []).append(module)
    found = []
    for members in groups.values():
        wider = dict(pairwise(bits)).get(members[0]["bits"])
        if wider is not None:
            extra = 0
            for m in members:
                d_in = widths[m["kind"]]
                sizes = [
                    storage_bits(m["num_weights"] // d_in, d_in, Choice(bits=b, group_size=m["group_size"]))
                    for b in (m["bits"], wider)
                ]
                extra += sizes[1] - sizes[0]
            found.append(extra)
    return min(found)


WIDTHS = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"), 128) | {"down_proj": 192}
ALL_BITS = (2, 3, 4, 5, 6, 8)

# --- the budget, the file, the manifest -----------------------------------------------------------


def test_budget_is_met_by_the_file(job: Job, first: dict[str, Any]) -> None:
    bits, weights = stored_bits(job.folder / "first")
    assert weights == LAYERS * (128 * 128 * 2 + 2 * 64 * 128 + 3 * 192 * 128)
    reached = bits / weights
    assert 3.48 <= reached <= 3.5
    assert first["budget"]["reached_bits"] == reached
    assert sum(module["storage_bits"] for module in first["modules"]) == bits
    # Costs fall with every bit, so an exact plan leaves less over than any group could still use.
    assert 3.5 * weights - bits < smallest_upgrade(first, WIDTHS, bits=ALL_BITS)
    assert len({bits for bits, _ in choices_of(first).values()}) > 1  # it is mixed at all


def test_manifest_beside_the_checkpoint_says_what_was_done(job: Job, first: dict[str, Any], model: Path) -> None:
    assert json.loads((job.folder / "first" / "lrpq.json").read_text()) == first
    assert first["model"] == str(model)
    assert first["bytes"] == {"original": file_bytes(model), "compressed": file_bytes(job.folder / "first")}
    assert first["budget"]["reached_bytes"] == file_bytes(job.folder / "first")
    assert first["budget"]["asked_bits"] == 3.5
    assert 0 <= first["budget"]["bound_nats"] <= first["budget"]["predicted_kl_nats"]
    assert first["budget"]["predicted_kl_nats"] == pytest.approx(sum(m["cost_nats"] for m in first["modules"]))
    assert first["configuration"]["run"]["seed"] == 0
    assert set(first["environment"]) >= {"torch", "transformers", "device", "threads"}
    stages = ["calibrate", "profile", "candidates", "allocate", "forecast", "refine", "guard", "assemble", "control"]
    assert {*stages, "evaluate"} <= set(first["seconds"])
    assert all(seconds > 0 for seconds in first["seconds"].values())
    assert (first["reused"], first["computed_nothing"], first["kept_16bit"]) == ([], False, [])
    assert first["degraded"]["rows"] == LAYERS * (3 * 128 + 2 * 64 + 2 * 192)
    assert first["degraded"]["correction_rejected_rows"] < first["degraded"]["rows"] / 2
    # transformers runs layers one by one: q, k and v need not share a choice
    chosen = choices_of(first)
    shared = [len({chosen[f"model.layers.{i}.self_attn.{x}_proj"] for x in "qkv"}) == 1 for i in range(LAYERS)]
    assert not all(shared)


def test_plain_transformers_loads_it_and_the_ruler_measures_what_the_manifest_says(
    job: Job, first: dict[str, Any], model: Path
) -> None:
    folder = job.folder / "first"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("\n\n".join(pydoc_documents("evaluate")), add_special_tokens=False, verbose=False).input_ids
    n, length = 4, 48
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id == 1
    stride = (len(ids) // length) // n
    reference: Any = AutoModelForCausalLM.from_pretrained(model).eval()
    checkpoint: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert checkpoint.dtype == torch.bfloat16
    nll = {"reference": 0.0, "lrpq": 0.0}
    kls = []
    with torch.no_grad():
        for i in range(n):
            x = torch.tensor([[1, *ids[i * stride * length : (i * stride + 1) * length - 1]]])
            r, q = (m(x).logits[0, :-1].float().log_softmax(-1) for m in (reference, checkpoint))
            nll["reference"] += functional.nll_loss(r, x[0, 1:]).item() / n
            nll["lrpq"] += functional.nll_loss(q, x[0, 1:]).item() / n
            kls.append((r.exp() * (r - q)).sum(-1).mean().item())
    found, kl = first["evaluation"], torch.tensor(kls)
    assert (found["windows"], found["length"], found["source"]) == (n, length, "pydoc:evaluate")
    for name, value in nll.items():
        assert found[name]["perplexity"] == pytest.approx(math.exp(value), rel=1e-3)
    assert found["lrpq"]["kl_nats"] == pytest.approx(kl.mean().item(), rel=1e-3)
    assert found["lrpq"]["kl_standard_error"] == pytest.approx((kl.std() / math.sqrt(n)).item(), rel=1e-2)
    assert found["reference"]["kl_nats"] == 0.0
    # the control: uniform, nearest to what was reached, and worse even here
    assert found["control"]["label"] == "uniform GPTQ 3b/g64"
    assert found["control"]["all_in_bits"] == 3.25
    assert 0 < found["lrpq"]["kl_nats"] < found["control"]["kl_nats"]


# --- found again ----------------------------------------------------------------------------------


def test_the_same_again_computes_nothing_and_says_so(job: Job, first: dict[str, Any], model: Path) -> None:
    store, output = job.folder / "store", job.folder / "first"
    before = snapshot(store), contents(output), snapshot(output)
    again = job(model, "first")
    assert again["computed_nothing"]
    assert job.progress.stages == ["allocate"]
    stages = [
        *("calibrate", "evaluation text", "profile", "candidates", "forecast", "refine"),
        *("guard", "assemble", "control", "evaluate"),
    ]
    assert job.progress.reused == again["reused"] == stages
    after = snapshot(store), contents(output), snapshot(output)
    assert after[:2] == before[:2]
    assert {name for name in before[2] if before[2][name] != after[2][name]} == {"lrpq.json"}
    changing = ("reused", "computed_nothing", "seconds")
    assert {k: v for k, v in again.items() if k not in changing} == {
        k: v for k, v in first.items() if k not in changing
    }


def test_another_output_is_filled_from_the_store(job: Job, first: dict[str, Any], model: Path) -> None:
    before = snapshot(job.folder / "store")
    again = job(model, "elsewhere")
    assert again["computed_nothing"]
    assert set(job.progress.stages) == {"allocate", "assemble"}
    assert contents(job.folder / "elsewhere") == contents(job.folder / "first")
    assert snapshot(job.folder / "store") == before
    assert again["evaluation"] == first["evaluation"]


def reallocate(job: Job, first: dict[str, Any], output: str, **plan: Any) -> dict[str, Any]:
    """``lrpq reallocate`` with the run's evaluation."""
    with job.sharing() as progress:
        return run_reallocate(
            store=str(job.folder / "store"),
            run_id=first["run_id"],
            plan=PlanConfig.model_validate(plan),
            evaluation=EvaluationConfig(num_windows=4, length=48),
            cluster=ClusterConfig(workers=2, device="cpu"),
            output=job.folder / output,
            overwrite=False,
            progress=progress,
        )


def test_another_budget_computes_no_profile_and_no_candidates(job: Job, first: dict[str, Any]) -> None:
    before = snapshot(job.folder / "store")
    found = reallocate(job, first, "wider", budget_bits=4.75)
    assert job.progress.stages == ["allocate", "forecast", "refine", "guard", "assemble", "control", "evaluate"]
    assert not found["computed_nothing"]
    bits, weights = stored_bits(job.folder / "wider")
    assert 4.73 <= bits / weights <= 4.75
    assert found["evaluation"]["lrpq"]["kl_nats"] < 0.7 * first["evaluation"]["lrpq"]["kl_nats"]
    after = snapshot(job.folder / "store")
    assert {name: when for name, when in after.items() if name in before} == before
    new = {name.split("/")[1] for name in after.keys() - before.keys()}
    assert new == {"allocate", "forecast", "refine", "guard", "evaluate"}


def test_stitching_takes_the_stored_candidates_as_they_are(job: Job, first: dict[str, Any], model: Path) -> None:
    found = reallocate(job, first, "stitched", budget_bits=3.5, refine="stitch")
    assert "refine" not in job.progress.stages
    assert choices_of(found) == choices_of(first)
    from tasks.store.opened import open_store
    from tasks.store.tensors import read_tensors

    store, codes = open_store(str(job.folder / "store")), {}
    for key in store.list(f"{first['run_id']}/candidates"):
        if "/codes-" in key:
            codes |= read_tensors(store, key)
    for name, (bits, size) in choices_of(found).items():
        stored = codes[f"{name}|{bits}b/g{size}/f8|weight_packed"]
        assert torch.equal(packed(job.folder / "stitched", name), stored)
    # The first site has nothing quantized before it: but for the polish and rows that make up for each other's errors
    # its codes are the same; behind it they differ.
    reallocate(job, first, "unpolished", budget_bits=3.5, polish=0, row_blocks=1)
    same, other = "model.layers.0.self_attn.q_proj", "model.layers.3.mlp.down_proj"
    by_name = {n: packed(job.folder / n, same) for n in ("first", "stitched", "unpolished")}
    assert torch.equal(by_name["unpolished"], by_name["stitched"])
    assert not torch.equal(by_name["first"], by_name["stitched"])  # the same codes, polished
    assert not torch.equal(packed(job.folder / "unpolished", other), packed(job.folder / "stitched", other))
    assert found["evaluation"]["control"] == first["evaluation"]["control"]
    assert "correction_rejected_rows" not in found["degraded"]
    # what was forecast was measured on the windows that the result is measured on, with the very codes of this one
    assert "forecast" not in found
    expected, measured = first["forecast"], found["evaluation"]
    assert (expected["windows"], expected["length"], expected["source"]) == (4, 48, "pydoc:evaluate")
    assert expected["candidates"]["kl_nats"] == pytest.approx(measured["lrpq"]["kl_nats"], rel=1e-6)
    assert expected["kl_nats"] == expected["factor"] * expected["candidates"]["kl_nats"]
    assert expected["kl_nats"] != pytest.approx(first["evaluation"]["lrpq"]["kl_nats"], rel=1e-6)


def test_lagrangian_is_under_the_budget_and_no_better_than_exact(job: Job, first: dict[str, Any]) -> None:
    found = reallocate(job, first, "lagrangian", budget_bits=3.5, solver="lagrangian", refine="stitch")
    bits, weights = stored_bits(job.folder / "lagrangian")
    assert 3.3 < bits / weights <= 3.5
    assert found["budget"]["method"] == "lagrangian"
    exact = first["budget"]["predicted_kl_nats"]
    assert found["budget"]["bound_nats"] <= exact <= found["budget"]["predicted_kl_nats"] * (1 + 1e-9)
    assert 0 <= found["budget"]["gap"] < 0.2


def test_a_budget_that_buys_everything_says_so(job: Job, first: dict[str, Any]) -> None:
    found = reallocate(job, first, "all", budget_bits=12.0, refine="stitch")
    assert {bits for bits, _ in choices_of(found).values()} == {8}
    assert any("not used up" in text for text in found["warnings"])
    assert job.progress.notes == found["warnings"]


# --- rules, targets, sizes ------------------------------------------------------------------------


def test_keep_rules_hold_and_leave_the_control_uniform(job: Job, first: dict[str, Any], model: Path) -> None:
    keep = ["*.0.mlp.down_proj=16", "*.1.self_attn.q_proj=8", "*.2.mlp.*_proj=2"]
    found = reallocate(job, first, "kept", budget_bits=3.5, keep=keep, refine="stitch")
    chosen = choices_of(found)
    assert chosen["model.layers.0.mlp.down_proj"] == (16, None)
    assert chosen["model.layers.1.self_attn.q_proj"] == (8, 64)
    assert {chosen[f"model.layers.1.self_attn.{x}_proj"] for x in "kv"} != {(8, 64)}  # not fused: q alone
    assert {chosen[f"model.layers.2.mlp.{x}_proj"] for x in ("gate", "up", "down")} == {(2, 64)}
    assert found["kept_16bit"] == ["model.layers.0.mlp.down_proj"]
    assert found["kept_because"] == {"model.layers.0.mlp.down_proj": "keep rule '*.0.mlp.down_proj=16'"}
    bits, weights = stored_bits(job.folder / "kept")
    assert weights == sum(m["num_weights"] for m in found["modules"] if m["bits"] < 16)
    assert 3.45 <= bits / weights <= 3.5
    # the module that was kept is there as it was, but for the power of two that all of the stream has
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(dense(job.folder / "kept", name), dense(model, name) * 2.0 ** found["exponents"]["residual"])
    # There is no width that both rules allow, and yet there is a control: uniform at the same size.
    assert found["evaluation"]["control"]["label"] == "uniform GPTQ 3b/g64"


def dense(folder: Path, name: str) -> Tensor:
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118 - not a mapping
                found: Tensor = file.get_tensor(name)
                return found
    raise AssertionError(name)


def test_vllm_gets_what_its_kernels_run_and_is_told_what_stays(job: Job, first: dict[str, Any], model: Path) -> None:
    with pytest.raises(ConfigError, match=r"--target vllm: .*this run's are float8.*compress with"):
        reallocate(job, first, "vllm", budget_bits=5.0, target="vllm", refine="stitch")
    found = job(
        model,
        "vllm",
        run__candidates__scales="bfloat16",
        plan__budget_bits=5.0,
        plan__target="vllm",
        plan__refine="stitch",
    )
    left = [f"model.layers.{i}.mlp.down_proj" for i in range(LAYERS)]  # 192 inputs are no multiple of 128
    assert found["kept_16bit"] == left
    assert all("d_in 192 is no multiple of 128" in why for why in found["kept_because"].values())
    chosen = choices_of(found)
    assert {bits for name, (bits, _) in chosen.items() if name not in left} == {4, 8}
    for block in range(LAYERS):  # its kernels fuse q, k and v, gate and up: they share a choice
        for kinds in (("self_attn.q", "self_attn.k", "self_attn.v"), ("mlp.gate", "mlp.up")):
            assert len({chosen[f"model.layers.{block}.{kind}_proj"] for kind in kinds}) == 1
    bits, weights = stored_bits(job.folder / "vllm")
    assert bits / weights <= 5.0
    assert found["evaluation"]["control"]["label"] == "uniform GPTQ 4b/g64"


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"keep": ["*.9.*=4"]}, r"keep rule '\*\.9\.\*=4' matches no module"),
        ({"keep": ["*.q_proj=4", "*.k_proj=8"], "target": "vllm"}, "served as one layer"),
        ({"keep": ["*=16"]}, "no module may be quantized"),
        ({"budget_bits": 2.5, "keep": ["*.self_attn.[qkv]_proj=8"]}, "the smallest possible is"),
        ({"target": "vllm", "tensor_parallel": 2}, "no module may be quantized"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_before_anything_is_computed(
    job: Job, model: Path, rule: dict[str, Any], expected: str
) -> None:
    changes = {f"plan__{name}": value for name, value in rule.items()} | {"run__candidates__scales": "bfloat16"}
    with pytest.raises((ConfigError, BudgetError), match=expected):
        job(model, "refused", run__seed=77, **changes)
    assert set(job.progress.stages) <= {"calibrate", "evaluation text"}
    assert not (job.folder / "refused").exists()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_budget_in_bytes_is_respected_to_the_byte(job: Job, tied: bool) -> None:
    """In float32, where a module left alone takes 32 bits a weight: those bytes count too."""
    name = f"bytes-{tied}"
    model = write_model(job.folder / name, tied=tied, dtype=torch.float32, layers=3)
    common: dict[str, Any] = {"evaluation__enabled": False, "plan__refine": "stitch"}
    for number, keep in enumerate([(), ("*.1.mlp.*=16",)]):
        with pytest.raises(BudgetError, match=r"the smallest possible is (\d+) bytes") as refusal:
            job(model, "refused", **common, plan__keep=keep, plan__budget_bytes=1000)
        smallest = int(str(refusal.value).split("the smallest possible is ")[1].split()[0])
        with pytest.raises(BudgetError, match="impossible"):
            job(model, "refused", **common, plan__keep=keep, plan__budget_bytes=smallest - 1)
        for budget in (smallest, smallest + 50_000):
            output = f"{name}-{number}-{budget}"
            found = job(model, output, **common, plan__keep=keep, plan__budget_bytes=budget)
            total = file_bytes(job.folder / output)
            assert total <= budget
            assert found["budget"]["reached_bytes"] == found["size"]["total_bytes"] == total
            # what is left over buys no step of any group, but for the few bytes that headers were overestimated by
            step = smallest_upgrade(found, WIDTHS, bits=ALL_BITS) // 8
            assert budget - total < step + 200
            assert dense(job.folder / output, "model.norm.weight").dtype == torch.float32
        tensors = AutoModelForCausalLM.from_pretrained(job.folder / output).config
        assert tensors.tie_word_embeddings is tied


@pytest.mark.parametrize("sizes", [[32], [-1], [32, 64, -1]], ids=["32", "channel", "all"])
def test_group_sizes(job: Job, model: Path, sizes: list[int]) -> None:
    output = "groups-" + "-".join(map(str, sizes))
    found = job(
        model,
        output,
        run__candidates__group_sizes=sizes,
        run__candidates__bits=[2, 3, 4],
        plan__budget_bits=3.1,
        evaluation__num_windows=2,
    )
    bits, weights = stored_bits(job.folder / output)
    assert 3.05 <= bits / weights <= 3.1
    chosen = {size for _, size in choices_of(found).values()}
    assert chosen <= set(sizes)
    assert len(sizes) == 1 or len(chosen) > 1
    assert found["computed_nothing"] is False
    assert AutoModelForCausalLM.from_pretrained(job.folder / output).config.quantization_config is not None
    assert found["evaluation"]["control"]["kl_nats"] > 0


def test_a_group_size_that_divides_no_width_is_refused_first(job: Job, model: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"layers\.0\.mlp\.down_proj: no group size asked for \(128\) divides its 192"
    ):
        job(model, "refused", run__candidates__group_sizes=[128])
    assert set(job.progress.stages) <= {"calibrate", "evaluation text"}
    found = job(
        model,
        "ragged",
        run__candidates__group_sizes=[128, 64],
        run__candidates__bits=[3, 4],
        plan__budget_bits=3.5,
        evaluation__enabled=False,
    )
    sizes = {module["kind"]: module["group_size"] for module in found["modules"]}
    assert sizes["down_proj"] == 64


# --- relevance ------------------------------------------------------------------------------------


def test_every_relevance_makes_codes_of_its_own_from_the_same_curvature(
    job: Job, first: dict[str, Any], model: Path
) -> None:
    from tasks.store.manifest import read_manifest
    from tasks.store.opened import open_store

    found = {"blend": first}
    for relevance in ("fisher", "lrp", "cp-lrp"):
        found[relevance] = job(model, relevance, run__relevance=relevance, evaluation__control=False)
        assert "control" not in found[relevance]["evaluation"]
    store = open_store(str(job.folder / "store"))
    curvatures = []
    for manifest in found.values():
        (key,) = store.folders(f"{manifest['run_id']}/profile")
        profile = read_manifest(store, f"{manifest['run_id']}/profile/{key}/manifest.json").extra
        assert profile["num_tokens"] == 6 * 48
        assert profile["spilled_bytes"] == 0
        curvatures.append(profile["curvature"])
    assert all(c == curvatures[0] for c in curvatures)
    folders = [job.folder / ("first" if name == "blend" else name) for name in found]
    assert len({tuple(contents(folder).values()) for folder in folders}) == len(folders)
    for manifest in found.values():
        assert 0 < manifest["evaluation"]["lrpq"]["kl_nats"] < 3 * first["evaluation"]["lrpq"]["kl_nats"]


def test_a_seed_makes_another_run_beside_the_first(job: Job, first: dict[str, Any], model: Path) -> None:
    found = job(model, "seeded", run__seed=1, evaluation__enabled=False)
    assert found["run_id"] != first["run_id"]
    assert contents(job.folder / "seeded") != contents(job.folder / "first")
    assert "evaluation" not in found


def test_text_that_was_calibrated_on_is_warned_of(job: Job, model: Path) -> None:
    found = job(model, "same-text", evaluation__source="pydoc:calibrate", evaluation__control=False)
    assert any("read the same source (pydoc:calibrate)" in text for text in found["warnings"])
