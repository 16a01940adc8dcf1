"""The pipeline's stages on one GPU and on two of one host, as Ray actors: speed, results, memory, where the time goes.

    python -m benchmarks.two_gpus --model SmolLM2-135M-Instruct --text text:FILE --blocks 1 --json FILE

Profile, candidates and refinement run as `lrpq compress` runs them (flows/stages.py; the shape of the workers is its
own), but for Prefect, whose task runs around calls are left out. Every run has a pool, Ray included, and an empty
store of its own; before it is measured, its workers compress a micro-batch of the same shape for each of them, so that
kernels are compiled and Triton's cache is filled. With --model a checkpoint on text of --text; with --blocks a model of
that many blocks of 70B's shape with random weights, made in --folder, on random tokens. On a machine without GPUs
(--device cpu --hidden 64) the same on toy shapes, with workers of one core.

Of every stage: seconds, memory in tensors at its peak (torch.cuda.max_memory_allocated on every worker), seconds that
workers spent moving bytes (store, model, kept inputs, sums for other workers and from them), and waiting: the stage's
seconds less those in calls, which includes Ray's copies into and out of its shared memory. Moving waits for the device
first. Then whether both runs stored the same bytes. A case that fails says so, and the exit status is 1.
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
from pathlib import Path
from typing import Any

import torch
from ray.exceptions import RayError

from benchmarks.gpu.model import random_tokens
from benchmarks.two_gpus import ledger
from benchmarks.two_gpus.block import HIDDEN, write_blocks
from benchmarks.two_gpus.objects import compare
from benchmarks.two_gpus.stages import STAGES, Case, Done, as_json, run_stages
from benchmarks.two_gpus.table import call_table, stage_table, verdict
from flows.calibrate import load_for
from lrpq.errors import LrpqError
from tasks.opening import open_pool, resolve_device


def measure(case: Case, counts: Sequence[int], folder: Path, *, warm: bool, kept_bytes: int | None) -> dict[str, Any]:
    """One case with every number of workers; prints the tables."""
    windows, length = case.tokens.shape
    print(f"\n## {case.name}: {windows} x {length} tokens, {case.budget_bits:g} bits, {case.device}\n", flush=True)
    runs: list[Done] = []
    warming: list[float] = []
    devices: list[str] = []
    for number, count in enumerate(counts):
        with open_pool(device=case.device, workers=count, threads=1, kept_bytes=kept_bytes) as pool:
            devices = pool.each(ledger.device_name)
            began = time.perf_counter()
            if warm:
                run_stages(case.warming(count), pool, folder / f"warming-{number}")
                shutil.rmtree(folder / f"warming-{number}")
            warming.append(time.perf_counter() - began)
            runs.append(run_stages(case, pool, folder / f"run-{number}"))
        seconds = ", ".join(f"{name} {stage.seconds:.1f} s" for name, stage in runs[-1].stages.items())
        print(f"{count} workers on {', '.join(devices)}: {seconds}; warm-up {warming[-1]:.1f} s", flush=True)
        for loss in runs[-1].losses:
            print(f"LOST a worker: {loss}; the times are not those of an undisturbed run", flush=True)
    print("\n" + "\n".join(stage_table(runs)) + "\n", flush=True)
    for name in case.stages:
        print("\n".join(call_table(runs, name)) + "\n", flush=True)
    found: dict[str, Any] = {
        "case": case.name,
        "windows": windows,
        "length": length,
        "shards": case.shards,
        "micro_batch": case.micro_batch,
        "group_sizes": case.group_sizes,
        "devices": devices,
        "warming_seconds": warming,
        "runs": [as_json(run) for run in runs],
    }
    for other in range(1, len(runs)):
        compared = {name: compare(runs[0], runs[other], name) for name in case.stages}
        print(f"{counts[other]} workers against {counts[0]}:")
        print("\n".join(verdict(compared)), flush=True)
        found.setdefault("different", []).append({name: c.different for name, c in compared.items()})
    for number in range(len(counts)):
        shutil.rmtree(folder / f"run-{number}")
    return found


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
        shards=min(8, len(found.tokens)),
        group_sizes=options.group_sizes,
        stages=options.stages,
    )


def of_blocks(options: argparse.Namespace, folder: Path) -> Case:
    """Random blocks on random tokens."""
    device = torch.device(options.device)
    length = options.block_length
    model = write_blocks(folder / "model", hidden=options.hidden, blocks=options.blocks, length=length, device=device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    name = f"{options.blocks} random {'block' if options.blocks == 1 else 'blocks'} of 70B's shape"
    return Case(
        name=name if options.hidden == HIDDEN else f"{name}, {options.hidden} wide",
        model=model,
        tokens=random_tokens(options.block_windows, length),
        device=options.device,
        budget_bits=options.budget,
        shards=min(8, options.block_windows),
        group_sizes=options.group_sizes,
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
    parser.add_argument("--hidden", type=int, default=HIDDEN, help="width of the blocks")
    parser.add_argument("--budget", type=float, default=3.25)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=numbers, default=(1, 2))
    parser.add_argument("--group-sizes", type=numbers, default=(64, -1), help="of the candidates")
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
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    for make in cases:
        with tempfile.TemporaryDirectory(dir=options.folder, prefix="lrpq-two-") as folder:
            try:
                found = measure(
                    make(options, Path(folder)),
                    options.workers,
                    Path(folder),
                    warm=not options.cold,
                    kept_bytes=options.kept_bytes,
                )
            except (LrpqError, OSError, RuntimeError, ValueError, RayError):
                failed = True
                print(f"{make.__name__} FAILED\n{traceback.format_exc()}", flush=True)
                continue
        document["cases"].append(found)
        if options.json is not None:
            options.json.write_text(json.dumps(document, indent=1))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
