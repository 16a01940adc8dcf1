"""``lrpq plan`` against the pipeline itself: FLOPs that its code runs, objects that it stores; models of the docs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_case import start_server, write_model

from benchmarks.plan import InlinePool, Stages, counter
from benchmarks.plan_table import CONFIGS, MODELS, planned, row, trellis_row
from flows.cli import run
from flows.commands.options import nested, presets
from flows.config import CompressConfig
from flows.estimating import asked_of
from flows.presets import FAST
from lrpq.errors import ConfigError, ModelError
from lrpq.model.described import DescribedModel, resolve_description
from lrpq.model.safetensors_source import ModelSource
from lrpq.plan.machine import Machine
from lrpq.plan.trellis import STEPS, trellis_steps
from lrpq.plan.work import COUNTED, Work, nearest
from tasks import hessian_bands
from tasks.estimate.asked import Cluster
from tasks.estimate.machines import known_gpu, read_machine, write_machine
from tasks.estimate.model import model_shape
from tasks.estimate.report import estimate
from tasks.estimate.stages import loads
from tasks.estimate.trellis_rates import TRELLIS_ASSUMED, with_trellis_rates
from tasks.hessian_bands import REST

PARAMETERS = {  # billions, as published
    "llama-3-8b": 8.03,
    "llama-3-70b": 70.55,
    "llama-3.1-405b": 405.85,
    "qwen2.5-72b": 72.71,
    "gemma-3-27b": 27.43,
    "mixtral-8x22b": 140.63,
}
ROOT = Path(__file__).parents[2]
WIDE = 1568
"""Inputs of a site that counts as wide here: more than the three strips that first bands begin with."""


def machine(**changes: Any) -> Machine:
    known = with_trellis_rates(known_gpu("h100"))
    return replace(known, device="cpu", device_bytes=0, process_bytes=600_000_000, **changes)


def cluster(**changes: Any) -> Cluster:
    found: dict[str, Any] = {
        "machine": machine(),
        "nodes": 1,
        "gpus_per_node": 0,
        "cpus_per_node": 1,
        "host_bytes": 10**12,
        "device_bytes": 0,
        "disk_bytes": 10**12,
        "network_bytes_per_second": 1e9,
        "remote_store": False,
    }
    return Cluster(**{**found, **changes})


def config_of(model: Path, folder: Path, *, fast: bool = False, codes: str = "uniform") -> CompressConfig:
    settings = nested(presets(dict.fromkeys(FAST), fast=fast))
    return CompressConfig.model_validate(
        {
            "run": {
                "model": str(model),
                "calibration": {"source": "pydoc:calibrate", "num_windows": 4, "length": 32},
                "shards": 4,
                "micro_batch": 2,
                **settings.get("run", {}),
                "candidates": {"bits": [3, 4], "group_sizes": [32], **({"cost_rows": 8} if fast else {})},
            },
            "plan": {"budget_bits": 3.75, "codes": codes, **settings.get("plan", {})},
            "evaluation": {"num_windows": 2, "length": 32},
            "cluster": {"workers": 1, "device": "cpu"},
            "output": folder / "output",
            "store": str(folder / "store"),
        }
    )


@pytest.mark.parametrize(
    ("fast", "ffn", "codes"),
    [
        (False, 128, "uniform"),
        (True, 128, "uniform"),
        (False, WIDE, "uniform"),
        (False, 128, "trellis"),
        (True, 128, "trellis"),
    ],
    ids=["default", "fast", "wide", "trellis", "fast trellis"],
)
def test_what_is_planned_is_what_runs(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: bool, ffn: int, codes: str
) -> None:
    """A whole compression in this process, every product counted; of a wide site Hessians are in two objects."""
    from flows.compress import run_compress

    monkeypatch.setattr(hessian_bands, "LEAST_WIDTH", WIDE)
    start_server(request)
    model = write_model(tmp_path / "model", layers=2, hidden=64, ffn=ffn)
    described = tmp_path / "described"
    described.mkdir()
    shutil.copy(model / "config.json", described)
    config = config_of(model, tmp_path, fast=fast, codes=codes)
    source = DescribedModel(described)
    found = estimate(source, asked_of(config, source), cluster())
    counted: dict[str, int] = {}
    with counter() as counting:

        def change(event: str, name: str) -> None:
            total = sum(counting.counts.values())
            counted[name] = total if event == "begin" else total - counted[name]

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            manifest = run_compress(config, Stages(change), pool=InlinePool(1, 1 << 40))  # type: ignore[arg-type]
        finally:
            torch.set_num_threads(threads)
    stages = {stage.stage: stage for stage in found.stages}
    assert ("refine" in stages) == ("refine" in counted) == (not fast)
    assert ("forecast" in stages) == ("forecast" in counted) == (not fast and codes == "uniform")
    assert ("stitch" in stages) == ("stitch" in counted) == ("uniform" in stages) == ("uniform" in counted) == fast
    assert manifest["configuration"]["run"]["gradients_every"] == (8 if fast else 1)
    for name in stages.keys() & {
        "profile",
        "candidates",
        "stitch",
        "forecast",
        "refine",
        "uniform",
        "guard",
        "control",
        "evaluate",
    }:
        # rows that stop moving drop out of the polish, rows drawn twice are quantized once: the plan is an upper bound
        most = 1.2 if fast and name == "candidates" else 1.1
        assert counted[name] * 0.99 <= stages[name].flops <= counted[name] * most, name
    files = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert found.store_objects == len(files)
    assert len([path for path in files if path.name.startswith(REST)]) == (2 if ffn == WIDE else 0)
    stored = sum(path.stat().st_size for path in files)
    assert abs(found.store_bytes / stored - 1) < 0.25, "headers and tables are most of so small a store"
    reached = manifest["budget"]["reached_bytes"]
    assert abs(found.checkpoint_bytes / reached - 1) < 0.02


def test_a_description_is_the_model(tmp_path: Path) -> None:
    """Names, shapes and bytes from config.json are those of the files."""
    for name, options in (("tied", {"tied": True}), ("untied", {"dtype": torch.float32})):
        model = write_model(tmp_path / name, **options)
        real, described = ModelSource(model), DescribedModel(model)
        assert described.names() == real.names()
        assert [described.shape(n) for n in real.names()] == [real.shape(n) for n in real.names()]
        assert [described.nbytes(n) for n in real.names()] == [real.nbytes(n) for n in real.names()]


@pytest.mark.parametrize("name", MODELS)
def test_parameters_of_the_docs_models(name: str) -> None:
    source = DescribedModel(CONFIGS / name)
    number = sum(torch.Size(source.shape(tensor)).numel() for tensor in source.names())
    assert round(number / 1e9, 2) == PARAMETERS[name]


@pytest.mark.parametrize("name", ["gemma-3-27b", "mixtral-8x22b"])
def test_the_docs_table_is_what_is_printed(name: str) -> None:
    text = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    assert "| " + " | ".join(row(name, planned(name))) + " |" in text.splitlines()


def test_the_docs_table_has_a_row_of_trellis_codes() -> None:
    text = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    assert "| " + " | ".join(trellis_row()) + " |" in text.splitlines()


@pytest.mark.parametrize("gpus", [1, 8])
def test_trellis_codes_take_longer_where_they_are_made(gpus: int) -> None:
    """By the steps that are counted; candidates and the control are what they were."""
    uniform, coded = (planned("llama-3-8b", gpus=gpus, codes=codes) for codes in ("uniform", "trellis"))
    before, after = ({stage.stage: stage for stage in found.stages} for found in (uniform, coded))
    assert before.keys() - after.keys() == {"forecast"}
    for name in ("profile", "candidates", "control"):
        assert after[name] == before[name], name
    assert before["refine"].seconds * 2 < after["refine"].seconds
    assert before["refine"].device_bytes <= after["refine"].device_bytes < 1.5 * before["refine"].device_bytes
    assert [text for text in coded.assumptions if "trellis" in text] == [TRELLIS_ASSUMED]
    assert not any("trellis" in text for text in uniform.assumptions)


def test_a_refinement_with_trellis_codes_is_priced_by_its_steps() -> None:
    """Twice the rates, as much less time as the steps took."""
    source = DescribedModel(CONFIGS / "llama-3-8b")
    asked = replace(asked_of(config_of(CONFIGS / "llama-3-8b", Path("planned"), codes="trellis"), source), threads=1)
    assert asked.trellis
    slow, fast = machine(), machine()
    fast = replace(fast, rates={k: v * (2 if k.startswith(STEPS) else 1) for k, v in fast.rates.items()})
    shape = model_shape(source, asked)
    times = [estimate(source, asked, cluster(machine=m), shape=shape) for m in (slow, fast)]
    slower, faster = (next(s.seconds for s in found.stages if s.stage == "refine") for found in times)
    load = loads(shape, asked, num_workers=1, cpu=True, kept_bytes=1 << 40)["refine"]
    steps = {kind: amount for kind, amount in load.busiest.amounts.items() if kind.startswith(STEPS)}
    assert sum(steps.values()) == trellis_steps(load.busiest) > 0
    assert slower - faster == pytest.approx(sum(amount / fast.rates[kind] for kind, amount in steps.items()))


def test_more_of_everything_takes_more() -> None:
    few, many = planned("llama-3-8b", gpus=1), planned("llama-3-8b", gpus=8)
    assert few.flops == pytest.approx(many.flops)
    assert few.seconds > 1.5 * many.seconds
    assert few.workers == 1
    assert many.workers == 8


def test_low_memory_takes_less_of_a_gpu_and_more_of_the_host() -> None:
    plain, low = (planned("llama-3-70b", gpus=1, low_memory=low_memory) for low_memory in (False, True))
    assert low.seconds == plain.seconds  # copies are not priced
    for name in ("profile", "refine"):
        before, after = (next(s for s in found.stages if s.stage == name) for found in (plain, low))
        assert before.device_bytes < 60e9
        assert after.device_bytes < 24e9 < before.device_bytes
        assert after.host_bytes > before.host_bytes + 10e9


def test_workers_that_share_a_gpu_have_to_fit_together() -> None:
    one, three = (planned("llama-3-70b", gpus=1, workers=workers) for workers in (1, 3))
    assert not any("on a GPU" in problem for problem in one.problems)
    worst = max(three.stages, key=lambda stage: stage.device_bytes)
    assert worst.device_bytes < 80e9 < 3 * worst.device_bytes
    together = f"{worst.stage}: {3 * worst.device_bytes / 1e9:.1f} GB on a GPU of 80.0 GB, for 3 workers share it"
    assert f"{together}: use one worker a GPU" in three.problems
    assert sum("share a GPU" in text for text in three.assumptions) == 1
    assert not any("share a GPU" in text for text in one.assumptions)


def test_what_does_not_fit_is_said() -> None:
    small = planned("llama-3-70b", node_memory="160GB")
    (problem,) = small.problems
    assert problem.startswith("assemble: ")
    assert "loaded whole" in problem
    huge = planned("llama-3.1-405b")
    assert any("on a GPU of 80.0 GB" in problem for problem in huge.problems)
    assert not huge.document()["fits"]


def test_workers_without_a_shard_are_a_problem_where_shards_were_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "narrow")
    arguments = ["plan", str(model), "--gpus", "8", "--node-memory", "2TB", "--json"]
    idle = "some workers have nothing to do in profile and refine"
    assert run(arguments) == 0  # 128 windows in 4 shards
    assert sum(idle in text for text in json.loads(capsys.readouterr().out)["assumptions"]) == 1
    asked = tmp_path / "four.toml"
    asked.write_text("[run]\nshards = 4\n", encoding="utf-8")
    assert run([*arguments, "--config", str(asked)]) == 2
    assert any("8 workers and 4 shards" in text for text in json.loads(capsys.readouterr().out)["problems"])


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "machine.json"
    write_machine(path, machine())
    assert read_machine(path) == machine()
    config = CONFIGS / "llama-3-8b" / "config.json"
    arguments = ["plan", str(config), "--gpus", "8", "--machine", str(path), "--json"]
    write_machine(path, known_gpu("h100"))
    assert run([*arguments, "--node-memory", "2TB"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["fits"]
    assert {stage["stage"] for stage in document["stages"]} >= {"profile", "candidates", "refine", "assemble"}
    assert run([*arguments, "--node-memory", "2TB", "--fast"]) == 0
    fast = {stage["stage"]: stage["flops"] for stage in json.loads(capsys.readouterr().out)["stages"]}
    assert "refine" not in fast
    # of a forward, a recomputed one, two backward passes and the sums, the first stays, and an eighth of one backward
    assert fast["profile"] < 0.6 * next(s["flops"] for s in document["stages"] if s["stage"] == "profile")
    assert run([*arguments, "--gpu-memory", "4GB"]) == 2
    assert not json.loads(capsys.readouterr().out)["fits"]
    assert run(["plan", str(config), "--gpus", "3", "--nodes", "2"]) == 2
    assert "as many GPUs on every node" in capsys.readouterr().err
    assert run(["plan", str(tmp_path / "nowhere"), "--gpus", "8"]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert run([*arguments, "--node-memory", "2TB", "--codes", "trellis"]) == 0
    coded = json.loads(capsys.readouterr().out)
    assert coded["seconds"] > 1.3 * document["seconds"]
    assert any("trellis" in text for text in coded["assumptions"])
    old = replace(known_gpu("h100"), device="cpu", device_bytes=0)  # as measured before there were such codes
    write_machine(path, old)
    small = ["plan", str(config), "--machine", str(path), "--json"]
    assert run(small) in (0, 2)
    assert json.loads(capsys.readouterr().out)["seconds"] > 0
    assert run([*small, "--codes", "trellis"]) == 2
    assert "lrpq plan --calibrate" in capsys.readouterr().err
    path.write_text("{}", encoding="utf-8")
    assert run(arguments) == 2
    assert "measure again" in capsys.readouterr().err
    assert run(["plan", str(config), "--gpus", "8", "--gpu", "abacus"]) == 2
    assert "known are h100" in capsys.readouterr().err


def test_other_descriptions_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["BertForMaskedLM"], "model_type": "bert"}')
    with pytest.raises(ModelError, match="unsupported architecture"):
        DescribedModel(tmp_path)
    with pytest.raises(ModelError, match="no such folder"):
        resolve_description("/nowhere/at/all")
    with pytest.raises(ConfigError):
        known_gpu("abacus")


def test_work_is_priced_by_the_nearest_width() -> None:
    rates = {"matmul:float32:128": 1.0, "matmul:float32:4096": 4.0, "columns": 2.0}
    assert nearest("matmul:float32:1000", rates) == "matmul:float32:4096"
    assert nearest("matmul:float32:500", rates) == "matmul:float32:128"
    work = Work(amounts={"matmul:float32:100": 3.0, "columns": 4.0, COUNTED: 100.0})
    assert work.seconds(rates) == 5.0
    assert (2 * work + work).flops == 309.0
    with pytest.raises(KeyError):
        Work(amounts={"search": 1.0}).seconds(rates)
