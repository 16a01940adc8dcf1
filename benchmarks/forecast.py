"""How far a plan's divergence is known before its codes are refined.

    python -m benchmarks.forecast MODEL --calibration FILE --text FILE [--budgets 2.75,3.25,4.25,5.25,6.25] [--seeds 0]
        [--windows 128] [--length 1024] [--text-windows 64] [--scale-bits 16] [--device cpu]

By budget: the sum of the plan's costs, and on the held-out windows of the calibration text and on the other text the KL
divergence of the plan's candidates (GPTQ on the original inputs), that of the refined codes, and their ratio; then what
`lrpq compress` would have forecast, from some windows of the other text, and how many times that is measured. Costs are
no forecast where errors of layers meet, and a divergence on one text is none of that on another.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.benches import BenchTerms, budgets, numbers, spread_windows, workbench
from lrpq.allocate.forecast import REFINED, refined_kl, stride_of
from lrpq.compare import allocation
from lrpq.compare.codes import Codes, stitched
from lrpq.compare.recipes import DEFAULT
from lrpq.compare.workbench import Quantized, Workbench
from lrpq.evaluate.divergence import summarize
from lrpq.importance.registry import MEASURES

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor


def divergence(bench: Workbench, windows: Int[Tensor, "windows length"], codes: Codes) -> float:
    """KL of codes on some windows, nats a token."""
    scores = bench.scores(windows, Quantized(codes=codes, vectors={}), original=bench)
    return summarize(scores["variant"]).kl_nats


def shares(
    bench: Workbench,
    held_out: Int[Tensor, "held_out length"],
    text: Int[Tensor, "windows length"],
    asked: Sequence[float],
) -> list[float]:
    """Print a line a budget; returns what refinement leaves of the candidates' divergence on the text.

    What `lrpq compress` would have forecast is of the windows of the text that it measures.
    """
    measure = DEFAULT.allocation
    gathered = bench.gather(
        {measure: MEASURES[measure]},
        weightings=(DEFAULT.weighting,),
        candidates_by=DEFAULT.weighting,
        keep_candidates=True,
        with_outputs=True,
    )
    found, few = [], text[:: stride_of(len(text))]
    for budget in asked:
        plan = allocation.by_costs(gathered.costs[measure], budget_bits=budget)
        before = stitched(gathered.candidates, plan)
        after = bench.codes(plan.choices, DEFAULT, gathered)
        line = f"seed {bench.terms.seed}  {budget:5.2f} bits  costs {plan.cost_nats:.5f}"
        measured = {"held out": held_out, "text": text}
        kls = {name: tuple(divergence(bench, of, codes) for codes in (before, after)) for name, of in measured.items()}
        for name, (candidates, refined) in kls.items():
            line += f"  {name}: candidates {candidates:.5f} refined {refined:.5f} ({refined / candidates:.2f})"
        candidates, refined = kls["text"]
        found.append(refined / candidates)
        forecast = refined_kl(divergence(bench, few, before))
        print(f"{line}  forecast {forecast:.5f} (measured is {refined / forecast:.2f} times it)", flush=True)
    return found


def summary(left: Sequence[float]) -> str:
    """The shares' geometric mean, which a forecast is fitted by, and how far they are from that of `lrpq compress`."""
    mean = math.exp(statistics.fmean(map(math.log, left)))
    return f"left: {mean:.3f} in the geometric mean, {min(left):.3f} to {max(left):.3f}; compress takes {REFINED:g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--budgets", default="2.75,3.25,4.25,5.25,6.25")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--text-windows", type=int, default=64)
    parser.add_argument("--scale-bits", type=int, default=16, choices=(8, 16), help="of a group's scale")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    text = spread_windows(arguments.model, arguments.text, number=arguments.text_windows, length=arguments.length)
    terms = BenchTerms(
        model=arguments.model,
        calibration=arguments.calibration,
        windows=arguments.windows,
        length=arguments.length,
        bits=(2, 3, 4, 5, 6, 8),
        group_sizes=(64, -1),
        scale_bits=arguments.scale_bits,
        device=arguments.device,
    )
    left: list[float] = []
    for seed in numbers(arguments.seeds):
        bench, held_out = workbench(terms, seed=seed)
        left += shares(bench.scaled(), held_out, text, budgets(arguments.budgets))
    print(summary(left))


if __name__ == "__main__":
    main()
