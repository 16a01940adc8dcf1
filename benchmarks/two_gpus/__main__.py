"""The pipeline's stages on one GPU and on two of one host, as Ray actors: speed, results, memory, where the time goes.

    python -m benchmarks.two_gpus --model SmolLM2-135M-Instruct --text text:FILE --blocks 1 --json FILE

Profile, candidates and refinement run as `lrpq compress` runs them (flows/stages.py; the shape of the workers is its
own), but for Prefect, whose task runs around calls are left out. Every run has a pool, Ray included, and an empty
store of its own; before it is measured, its workers do the same once (--cold: not): fewer tokens would give another
plan, and a plan's widths and group sizes have kernels of their own, which take seconds to compile. With --model a
checkpoint on text of --text; with --blocks a model of that many blocks of 70B's shape (--shape smollm2: of SmolLM2's,
30 blocks) with random weights, made in --folder, on random tokens. On a machine without GPUs (--device cpu --hidden
128) the same on toy shapes, with workers of one core.

Of every stage: seconds, memory in tensors at its peak (torch.cuda.max_memory_allocated on every worker), seconds that
workers spent moving bytes (store, model, kept inputs, sums for other workers and from them), and waiting: the stage's
seconds less those in calls, which includes Ray's copies into and out of its shared memory. Moving waits for the device
first. Then whether both runs stored the same bytes; digests say so of runs in processes of their own (--workers 1, and
--workers 2 on other GPUs at the same time). A case that fails says so, and the exit status is 1. What is known of a
stage is printed, and written to --json, when it is done: a run that is cut off leaves that.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ray.exceptions import RayError

from benchmarks.gpu.model import random_tokens
from benchmarks.two_gpus import ledger
from benchmarks.two_gpus.block import HIDDEN, shape_named, write_blocks
from benchmarks.two_gpus.objects import compare, digest
from benchmarks.two_gpus.stages import STAGES, Case, Done, Stage, as_json, run_stages
from benchmarks.two_gpus.table import call_lines, call_table, stage_line, stage_table, verdict
from flows.calibrate import load_for
from lrpq.errors import LrpqError
from tasks.opening import open_pool, resolve_device


def measure(
    case: Case, folder: Path, options: argparse.Namespace, found: dict[str, Any], save: Callable[[], None]
) -> None:
    """One case with every number of workers; of every stage a line is printed and ``found`` saved when it is done."""
    counts: Sequence[int] = options.workers
    windows, length = case.tokens.shape
    print(f"\n## {case.name}: {windows} x {length} tokens, {case.budget_bits:g} bits, {case.device}\n", flush=True)
    found |= {"case": case.name, "windows": windows, "length": length, "shards": case.num_shards}
    found |= {"micro_batch": case.micro_batch, "group_sizes": case.group_sizes, "bits": case.bits}
    found |= {"warming_seconds": [], "runs": []}
    runs: list[Done] = []
    for number, count in enumerate(counts):
        with open_pool(device=case.device, workers=count, threads=1, kept_bytes=options.kept_bytes) as pool:
            found["devices"] = pool.each(ledger.device_name)
            found["host_threads"] = pool.shape.host_threads
            began = time.perf_counter()
            if not options.cold:
                run_stages(case, pool, folder / f"warming-{number}", partial(say, "  warm-up: "))
                shutil.rmtree(folder / f"warming-{number}")
            found["warming_seconds"].append(time.perf_counter() - began)
            print(f"warm-up of {count} workers: {found['warming_seconds'][-1]:.1f} s", flush=True)
            stages: dict[str, Any] = {}
            found["runs"].append(stages)

            def note(name: str, stage: Stage, stages: dict[str, Any] = stages) -> None:
                say("", name, stage)
                print("\n".join(call_lines(stage)), flush=True)
                stages[name] = as_json(stage)
                save()

            runs.append(run_stages(case, pool, folder / f"run-{number}", note))
            for name in case.stages:
                found.setdefault("digests", []).append(f"{name}, {count} workers: {digest(runs[-1], name)}")
                print(f"stored by {found['digests'][-1]}", flush=True)
        for loss in runs[-1].losses:
            print(f"LOST a worker: {loss}; the times are not those of an undisturbed run", flush=True)
    print(f"\n{', '.join(found['devices'])}; {found['host_threads']} threads move bytes")
    print("\n" + "\n".join(stage_table(runs)) + "\n", flush=True)
    for name in case.stages:
        print("\n".join(call_table(runs, name)) + "\n", flush=True)
    for other in range(1, len(runs)):
        compared = {name: compare(runs[0], runs[other], name) for name in case.stages}
        print(f"{counts[other]} workers against {counts[0]}:")
        print("\n".join(verdict(compared)), flush=True)
        found.setdefault("different", []).append({name: c.different for name, c in compared.items()})
        save()
    for number in range(len(counts)):
        shutil.rmtree(folder / f"run-{number}")


def say(before: str, name: str, stage: Stage) -> None:
    """Print a stage's line."""
    print(before + stage_line(name, stage), flush=True)


def of_model(options: argparse.Namespace, folder: Path) -> Case:
    """A checkpoint on text."""
    found = load_for(
        options.model,
        source=options.text,
        num_windows=options.windows,
        length=options.length,
        seed=0,
        placement="random",
    )
    return Case(
        name=options.model.name,
        model=options.model,
        tokens=found.tokens,
        device=options.device,
        budget_bits=options.budget,
        group_sizes=options.group_sizes,
        bits=options.bits,
        stages=options.stages,
    )


def of_blocks(options: argparse.Namespace, folder: Path) -> Case:
    """Random blocks on random tokens."""
    device = torch.device(options.device)
    length = options.block_length
    shape = shape_named(options.shape, hidden=options.hidden)
    model = write_blocks(folder / "model", shape, blocks=options.blocks, length=length, device=device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    name = f"{options.blocks} random {'block' if options.blocks == 1 else 'blocks'} of {options.shape}'s shape"
    return Case(
        name=f"{name}, {shape.hidden} wide",
        model=model,
        tokens=random_tokens(options.block_windows, length),
        device=options.device,
        budget_bits=options.budget,
        group_sizes=options.group_sizes,
        bits=options.bits,
        stages=options.stages,
    )


def numbers(text: str) -> tuple[int, ...]:
    """Such as ``64,-1``."""
    return tuple(int(number) for number in text.split(","))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--text", default="pydoc:calibrate", help="as --calibration of lrpq compress")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=0)
    parser.add_argument("--block-windows", type=int, default=128)
    parser.add_argument("--block-length", type=int, default=2048)
    parser.add_argument("--shape", choices=("70B", "smollm2"), default="70B", help="of the blocks")
    parser.add_argument("--hidden", type=int, default=HIDDEN, help="width of blocks in the proportions of 70B")
    parser.add_argument("--budget", type=float, default=3.25)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=numbers, default=(1, 2))
    parser.add_argument("--group-sizes", type=numbers, default=(64,), help="of the candidates")
    parser.add_argument("--bits", type=numbers, default=(2, 3, 4), help="of the candidates")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="the last stage")
    parser.add_argument("--cold", action="store_true", help="no warm-up")
    parser.add_argument("--kept-bytes", type=int, help="as kept_bytes in [cluster]")
    parser.add_argument("--folder", type=Path, help="where models and stores lie while it runs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.device = resolve_device(options.device)
    options.stages = STAGES[: STAGES.index(options.until) + 1]
    cases: list[Callable[[argparse.Namespace, Path], Case]] = []
    cases += [of_model] if options.model is not None else []
    cases += [of_blocks] if options.blocks else []
    failed = False
    document: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version(), "cases": []}
    document["cores"] = len(os.sched_getaffinity(0))

    def save() -> None:
        if options.json is not None:
            options.json.write_text(json.dumps(document, indent=1))

    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    for make in cases:
        with tempfile.TemporaryDirectory(dir=options.folder, prefix="lrpq-two-") as folder:
            found: dict[str, Any] = {}
            document["cases"].append(found)
            try:
                measure(make(options, Path(folder)), Path(folder), options, found, save)
            except (LrpqError, OSError, RuntimeError, ValueError, RayError):
                failed = True
                found["failed"] = traceback.format_exc()
                print(f"{make.__name__} FAILED\n{found['failed']}", flush=True)
        save()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
