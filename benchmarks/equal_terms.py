"""``lrpq compare`` without Ray, Prefect and the store: for a bare machine with a GPU.

    python -m benchmarks.equal_terms MODEL --calibration FILE --text FILE [--methods lrpq,control,weights:*]
        [--budgets 3.25,4.25] [--seeds 0,1,2] [--windows 128] [--length 1024] [--device cuda] [--json FILE]
        [--replace polish_rounds=0,correction=.25] [--group-sizes 64,-1] [--scale-bits 8] [--codes trellis]

The same methods, workbench and windows; rows are printed and written as they are measured. ``--peak`` prints what the
device computes and copies at, so that seconds can be read against it. ``--replace`` changes numbers in the recipe of
every method but the control. With ``--codes trellis`` all methods but the control and what is built on it have
trellis codes (quant/trellis.py).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.benches import BenchTerms, budgets, numbers, spread_windows, workbench
from lrpq.compare.methods import methods_named
from lrpq.compare.recipes import CONTROL, Recipe
from lrpq.compare.run import Comparison
from lrpq.evaluate.divergence import summarize


def peak(device: str) -> str:
    """Rate of a large bf16 matrix product and of a copy, medians of five."""
    x = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    y = torch.empty(1 << 28, device=device)

    def seconds(action: object) -> float:
        times = []
        for _ in range(5):
            torch.cuda.synchronize()
            started = time.perf_counter()
            action()  # type: ignore[operator]
            torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        return sorted(times)[2]

    product, copy = seconds(lambda: x @ x), seconds(y.clone)
    rates = f"{2 * 8192**3 / product / 1e12:.0f} TFLOP/s, {2 * y.nbytes / copy / 1e12:.2f} TB/s"
    return f"{torch.cuda.get_device_name()}: {rates}"


def replaced(recipe: Recipe, fields: Mapping[str, str]) -> Recipe:
    """The recipe with other numbers.

    Raises:
        SystemExit: a recipe has no such number, or the value is none of its kind.
    """
    found: dict[str, Any] = {}
    for name, value in fields.items():
        now = getattr(recipe, name, None)
        if isinstance(now, bool) or not isinstance(now, int | float):
            raise SystemExit(f"--replace {name}: not a number of a recipe")
        try:
            found[name] = type(now)(value)
        except ValueError:
            kind = "a whole number" if isinstance(now, int) else "a number"
            raise SystemExit(f"--replace {name}={value}: expected {kind}") from None
    return replace(recipe, **found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--methods", default="lrpq,control,gptq-in-order,nearest")
    parser.add_argument("--budgets", default="3.25,4.25")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--text-windows", type=int, default=64)
    parser.add_argument("--bits", default="2,3,4,5,6,8")
    parser.add_argument("--group-sizes", default="64,-1")
    parser.add_argument("--scale-bits", type=int, default=16, choices=(8, 16), help="of a group's scale")
    parser.add_argument("--codes", default="uniform", choices=("uniform", "trellis"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--micro-batch", type=int, help="windows at once; by default as `lrpq compress` chooses")
    parser.add_argument("--replace", default="")
    parser.add_argument("--peak", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.peak:
        print(peak(arguments.device), flush=True)
    scored = spread_windows(arguments.model, arguments.text, number=arguments.text_windows, length=arguments.length)
    fields = dict(part.split("=") for part in arguments.replace.split(",") if part)
    methods = {
        name: method if method.recipe == CONTROL else replace(method, recipe=replaced(method.recipe, fields))
        for name, method in methods_named(arguments.methods.split(",")).items()
    }
    rows: list[dict[str, object]] = []
    terms = BenchTerms(
        model=arguments.model,
        calibration=arguments.calibration,
        windows=arguments.windows,
        length=arguments.length,
        bits=numbers(arguments.bits),
        group_sizes=numbers(arguments.group_sizes),
        scale_bits=arguments.scale_bits,
        device=arguments.device,
        trellis=arguments.codes == "trellis",
        micro_batch=arguments.micro_batch,
    )
    wanted = [(name, budget) for budget in budgets(arguments.budgets) for name in methods]
    for seed in numbers(arguments.seeds):
        bench, _ = workbench(terms, seed=seed)
        comparison = Comparison(bench, methods, wanted, scored)
        comparison.check()
        for row in comparison.rows():
            found = summarize(list(row.scores))
            print(
                f"seed {seed}  {row.budget_bits:5.2f}  {row.method:32} {row.all_in_bits:.3f} bits  "
                f"KL {found.kl_nats:.5f} +- {found.kl_standard_error or 0:.5f}  perplexity {found.perplexity:.3f}  "
                f"predicted {row.predicted_nats:.5f}  {row.seconds:.1f} s (evidence {row.evidence_seconds:.1f} s)  "
                f"{row.peak_bytes / 1e6:.0f} MB",
                flush=True,
            )
            rows.append(
                {
                    "seed": seed,
                    "method": row.method,
                    "budget_bits": row.budget_bits,
                    "all_in_bits": row.all_in_bits,
                    "predicted_nats": row.predicted_nats,
                    "counts": dict(row.counts),
                    "perplexity": found.perplexity,
                    "kl_windows": [score.kl_nats for score in row.scores],
                    "seconds": row.seconds,
                    "evidence_seconds": row.evidence_seconds,
                    "peak_bytes": row.peak_bytes,
                }
            )
            if arguments.json:
                arguments.json.write_text(json.dumps(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
