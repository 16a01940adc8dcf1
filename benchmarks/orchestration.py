"""What Prefect, Ray and the store cost: a compression as `lrpq compress` runs it, and its core calls in one process.

    python -m benchmarks.orchestration MODEL --windows 16 --length 512 --json orchestration.json
    python -m benchmarks.orchestration --tasks 2000

Both sides profile, make candidates at all widths, allocate and refine the same windows under the same plan, with one
worker of one thread, and give the same codes, which is checked. The pipeline runs before and after the plain side, each
time with a new store, server and cluster, and counts with the mean of both: a machine that slows down or speeds up
meanwhile then favours neither. The plain side calls `lrpq` (ProfileSweep, gptq,
RefineSweep, quantize_refined) in one loop; everything it makes stays in memory. Not on either side: reading the text,
the checkpoint with its proof, the evaluation. The breakdown has the start of Prefect's server and of Ray, beside
each other as `lrpq compress` starts them, apart from the stages: a run pays it once whatever its length.

``--tasks N`` is the cost of one task: N calls that do nothing through Pool.map, through Prefect's task runs around
Pool calls, and N small objects written to a folder, each divided by N.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from flows.compression import Compression, configured_pool
from flows.config import CompressConfig
from flows.prefect_server import prefect_api, starting_api
from flows.progress import PlainProgress
from flows.run import shown_step
from lrpq.determinism import compute_deterministically
from lrpq.model.kept import KeptInputs
from lrpq.model.layers import Choice, all_choices
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.streaming import BlockStream
from lrpq.quant.factor import factorize
from lrpq.quant.gptq import gptq, predicted_cost
from lrpq.quant.grid import Grid, QuantizedWeight
from lrpq.quant.hessian import normalized
from lrpq.quant.matched_curvature import bounded_sum, matched_curvature, trace_of
from lrpq.quant.packing import pack
from lrpq.refine.products import merge_products
from lrpq.refine.quantize import quantize_refined
from lrpq.refine.sweep import RefineSweep
from lrpq.relevance.composite import Relevance
from lrpq.relevance.sweep import BlockSums, ProfileSweep, Shard, SiteWeights, merge_block_sums
from lrpq.shards import root, split
from tasks.calibration.stored import read_windows
from tasks.opening import open_pool
from tasks.refine import read_refined
from tasks.resources import CPU_WINDOWS, SHARDS
from tasks.store.objects import open_store
from tasks.store.tensors import write_tensors
from tasks.streams import DTYPES
from tasks.worker import WorkerState


@dataclass
class Plain:
    """The core calls, in one process."""

    windows: torch.Tensor
    stream: BlockStream
    config: CompressConfig
    scale_bits: int
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, choices: dict[str, Choice | None]) -> dict[str, QuantizedWeight]:
        """Profile, candidates and refinement; codes by module."""
        started = time.perf_counter()
        sums, weights = self.profile()
        self.seconds["profile"] = time.perf_counter() - started
        started = time.perf_counter()
        self.candidates(sums)
        self.seconds["candidates"] = time.perf_counter() - started
        started = time.perf_counter()
        codes = self.refine(sums, weights, choices)
        self.seconds["refine"] = time.perf_counter() - started
        return codes

    @property
    def shards(self) -> list[Shard]:
        spans = split(len(self.windows), self.num_shards)
        return [
            Shard(index=i, first_window=span.start, tokens=self.windows[span.start : span.stop])
            for i, span in enumerate(spans)
        ]

    @property
    def num_shards(self) -> int:
        return min(self.config.run.shards or SHARDS, len(self.windows))

    def profile(self) -> tuple[dict[int, BlockSums], dict[int, dict[int, SiteWeights]]]:
        run = self.config.run
        sweep = ProfileSweep(
            self.stream,
            self.shards,
            num_shards=self.num_shards,
            relevance=Relevance(run.relevance),
            floor=run.relevance_floor,
            power=run.relevance_power,
            seed=run.seed,
            micro_batch=CPU_WINDOWS,
            kept=KeptInputs(memory_bytes=1 << 33),
        )
        sweep.embed()
        for block, module in self.stream.stream(range(self.stream.num_blocks)):
            sweep.forward(block, module)
        sweep.seed_gradients()
        sums: dict[int, BlockSums] = {}
        weights: dict[int, dict[int, SiteWeights]] = {}
        for block, module in self.stream.stream(range(self.stream.num_blocks - 1, -1, -1)):
            parts, weights[block] = sweep.backward(block, module)
            sums[block] = root(parts, self.num_shards, merge_block_sums)
        return sums, weights

    def candidates(self, sums: dict[int, BlockSums]) -> None:
        run = self.config.run.candidates
        choices = all_choices(run.bits, run.group_sizes, scale_bits=self.scale_bits)
        for block, found in sums.items():
            for site, specs in self.stream.sites(block).items():
                H = normalized(found.hessians[site], name=site)
                factor = factorize(H, damping=run.damping, name=site)
                for spec in specs:
                    W = self.stream.weight(spec)
                    made = gptq(W, factor, choices, grid=Grid(run.grid), name=spec.name)
                    c = matched_curvature(found.curvature[spec.name], bounded_sum(found.traces[spec.name]), trace_of(H))
                    predicted_cost(W, made, H, c / found.num_tokens)
                    for candidate in made:
                        pack(candidate)

    def refine(
        self,
        sums: dict[int, BlockSums],
        weights: dict[int, dict[int, SiteWeights]],
        choices: dict[str, Choice | None],
    ) -> dict[str, QuantizedWeight]:
        plan, run = self.config.plan, self.config.run
        sweep = RefineSweep(
            self.stream,
            {shard.index: shard.tokens for shard in self.shards},
            num_shards=self.num_shards,
            micro_batch=CPU_WINDOWS,
            with_shift=plan.correction > 0,
        )
        sweep.embed()
        codes: dict[str, QuantizedWeight] = {}
        for block, module in self.stream.stream(range(self.stream.num_blocks)):
            dense: dict[str, torch.Tensor] = {}
            for layers in self.stream.steps(block):
                site = layers[0].input_site
                s = {shard: of_shard.values[site] for shard, of_shard in weights[block].items()}
                merged = root(sweep.products(block, module, layers, s, dense), self.num_shards, merge_products)
                for spec in layers:
                    choice = choices[spec.name]
                    assert choice is not None
                    refined = quantize_refined(
                        self.stream.weight(spec),
                        merged,
                        choice,
                        strength=plan.correction,
                        damping=run.candidates.damping,
                        correction_damping=plan.correction_damping,
                        polish_rounds=plan.polish,
                        outputs=sums[block].outputs[spec.name],
                        row_blocks=plan.row_blocks,
                        grid=Grid(run.candidates.grid),
                        name=spec.name,
                    )
                    codes[spec.name] = refined.weight
                dense = {spec.name: codes[spec.name].dequantize(self.stream.dtype) for spec in self.read(block, codes)}
            sweep.advance(block, module, dense)
        return codes

    def read(self, block: int, codes: dict[str, QuantizedWeight]) -> list[Any]:
        return [spec for spec in self.stream.block_specs(block) if spec.name in codes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piped:
    """The pipeline's side."""

    once: dict[str, float]
    """Seconds of what a run pays once."""
    stages: dict[str, float]
    processor: float
    """Seconds of all processes during the stages."""
    windows: torch.Tensor
    source: ModelSource
    """The model as it is compressed."""
    dtype: torch.dtype
    scale_bits: int
    choices: dict[str, Choice | None]
    codes: dict[str, QuantizedWeight]


def compare(model: Path, windows: int, length: int, budget: float, output: Path | None) -> None:
    """The pipeline, the plain calls, and the pipeline again."""
    torch.set_num_threads(1)
    compute_deterministically()  # as workers do
    with tempfile.TemporaryDirectory() as folder:
        config = CompressConfig.model_validate(
            {
                "run": {
                    "model": str(model),
                    "calibration": {
                        "source": "pydoc:calibrate",
                        "num_windows": windows,
                        "length": length,
                        "held_out": 0,
                    },
                },
                "plan": {"budget_bits": budget},
                "evaluation": {"enabled": False},
                "cluster": {"workers": 1, "device": "cpu"},
                "output": Path(folder) / "out",
                "store": str(Path(folder) / "store"),
            }
        )
        first = piped(config.model_copy(update={"store": str(Path(folder) / "first")}))
        plain = Plain(
            windows=first.windows,
            stream=BlockStream(first.source, dtype=first.dtype),
            config=config,
            scale_bits=first.scale_bits,
        )
        before = time.process_time()
        made = plain.run(first.choices)
        plain_cpu = time.process_time() - before
        second = piped(config.model_copy(update={"store": str(Path(folder) / "second")}))
    both = (first, second)
    same = all(
        torch.equal(run.codes[name].codes, made[name].codes) and torch.equal(run.codes[name].scales, made[name].scales)
        for run in both
        for name in first.choices
    )
    stages, once = (
        {name: _mean([getattr(run, key)[name] for run in both]) for name in getattr(first, key)}
        for key in ("stages", "once")
    )
    pipeline_cpu = _mean([run.processor for run in both])
    core = sum(plain.seconds.values())
    print(f"{model.name}, {windows} x {length} tokens, one worker of one thread; codes equal: {same}\n")
    print("| part | plain s | pipeline s, first and second | cost |\n|---|---|---|---|")
    for name, value in stages.items():
        pair = ", ".join(f"{run.stages[name]:.1f}" for run in both)
        print(f"| {name} | {plain.seconds[name]:.1f} | {pair} | {value / plain.seconds[name] - 1:+.1%} |")
    total = sum(stages.values())
    pair = ", ".join(f"{sum(run.stages.values()):.1f}" for run in both)
    print(f"| stages together | {core:.1f} | {pair} | {total / core - 1:+.1%} |")
    for name, value in once.items():
        print(f"| {name} | | {', '.join(f'{run.once[name]:.1f}' for run in both)} | {value / core:+.1%} |")
    everything = [sum(run.stages.values()) + sum(run.once.values()) for run in both]
    pair = ", ".join(f"{value:.1f}" for value in everything)
    print(f"| **everything** | {core:.1f} | {pair} | **{_mean(everything) / core - 1:+.1%}** |")
    print(
        f"\nprocessor seconds of all processes, stages alone: plain {plain_cpu:.1f}, pipeline "
        f"{', '.join(f'{run.processor:.1f}' for run in both)} ({pipeline_cpu / plain_cpu - 1:+.1%}); on a machine "
        "with other work these say more than the wall clock"
    )
    if output is not None:
        document = {
            "codes_equal": same,
            "plain": {"stages": plain.seconds, "processor_seconds": plain_cpu},
            "pipeline": [{"stages": run.stages, "once": run.once, "processor_seconds": run.processor} for run in both],
        }
        output.write_text(json.dumps(document, indent=1))


def piped(config: CompressConfig) -> Piped:
    """The pipeline up to the refined codes."""
    once: dict[str, float] = {}
    began = time.perf_counter()
    with starting_api() as api, configured_pool(config) as pool:
        api()
        pool.each(_nothing)
        once["start of Prefect's server, Ray and a worker"] = time.perf_counter() - began
        before = processor_seconds()
        compression, refined = _pipeline(config, pool)
        processor = processor_seconds() - before
    store = open_store(config.store)
    choices = refined["choices"]
    return Piped(
        once=once,
        stages={name: compression.run_state.seconds[name] for name in ("profile", "candidates", "refine")},
        processor=processor,
        windows=read_windows(store, compression.windows.key),
        source=compression.source,
        dtype=DTYPES[compression.dtype],
        scale_bits=compression.scale_bits,
        choices=choices,
        codes={name: read_refined(store, refined["folder"], name, choices[name]) for name in choices},
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def processor_seconds() -> float:
    """Of this process and everything it started that lives: Ray's and Prefect's processes among them."""
    total = time.process_time()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            times = child.cpu_times()
            total += times.user + times.system
    return total


def _pipeline(config: CompressConfig, pool: Any) -> tuple[Compression, dict[str, Any]]:
    """The flow up to the refined codes; returns the compression and where its codes are."""
    import sys

    from prefect import flow

    import flows.compression as module

    found: dict[str, Any] = {}
    original = module.run_refine

    class Done(Exception):
        pass

    def refine_and_stop(run: Any, pool: Any, job: Any, stream: Any, *, label: str) -> Any:
        original(run, pool, job, stream, label=label)
        found.update(folder=job.folder, choices=dict(job.choices))
        raise Done

    module.run_refine = refine_and_stop  # type: ignore[assignment]
    compression = Compression(config, PlainProgress(sys.stderr))
    try:

        @flow(name="orchestration", validate_parameters=False, retries=0, persist_result=False)
        def flow_run() -> None:
            try:
                compression.run(pool)
            except Done:
                return

        flow_run()
    finally:
        module.run_refine = original
    return compression, found


def _nothing(state: WorkerState, *_: int) -> None:
    pass


def tasks(count: int) -> None:
    """Cost of one task, milliseconds."""
    from prefect import flow

    rows: dict[str, float] = {}
    with prefect_api(), open_pool(device="cpu", workers=2, threads=1) as pool:
        pool.each(_nothing)
        started = time.perf_counter()
        for _ in pool.map(_nothing, [(i,) for i in range(count)]):
            pass
        rows["Ray: Pool.map"] = time.perf_counter() - started

        @flow(name="tasks", validate_parameters=False, retries=0, persist_result=False)
        def flow_run() -> None:
            for number in range(count):
                shown_step(f"nothing · {number}", lambda: pool.get([pool.submit(0, _nothing)]))

        started = time.perf_counter()
        flow_run()
        rows["Prefect task run around one Pool call"] = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(folder)
        started = time.perf_counter()
        for number in range(count):
            write_tensors(store, f"r/{number}.safetensors", {"x": torch.zeros(1024)})
        rows["store: one object of 4 kB in a folder"] = time.perf_counter() - started
    print(f"{count} tasks\n\n| what | seconds | ms a task |\n|---|---|---|")
    for name, value in rows.items():
        print(f"| {name} | {value:.1f} | {1000 * value / count:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--budget", type=float, default=3.25)
    parser.add_argument("--tasks", type=int)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if asked.tasks:
        tasks(asked.tasks)
    if asked.model is not None:
        compare(asked.model, asked.windows, asked.length, asked.budget, asked.json)


if __name__ == "__main__":
    main()
