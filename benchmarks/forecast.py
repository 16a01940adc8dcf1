"""How far a plan's divergence is known before its codes are refined.

    python -m benchmarks.forecast MODEL --calibration FILE --text FILE [--budgets 2.75,3.25,4.25,5.25,6.25] [--seeds 0]
        [--windows 128] [--length 1024] [--text-windows 64] [--scale-bits 16] [--device cpu]

By budget: the sum of the plan's costs, and on the held-out windows of the calibration text and on the other text the KL
divergence of the plan's candidates (GPTQ on the original inputs), that of the refined codes, and their ratio. A ratio
that is much the same for all models and budgets would make the candidates' divergence a forecast; costs are none where
errors of layers meet, and a divergence on one text is none of that on another.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoTokenizer

from lrpq.compare import allocation
from lrpq.compare.codes import Codes, stitched
from lrpq.compare.recipes import DEFAULT
from lrpq.compare.terms import Terms
from lrpq.compare.workbench import Quantized, Workbench
from lrpq.evaluate.divergence import summarize
from lrpq.importance.registry import MEASURES
from lrpq.model.source import open_source
from tasks.calibration.held_out import default_held_out, split_held_out
from tasks.calibration.load import load_windows
from tasks.calibration.sources import parse_source
from tasks.resources import cut_of

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor


def divergence(bench: Workbench, windows: Int[Tensor, "windows length"], codes: Codes) -> float:
    """KL of codes on some windows, nats a token."""
    scores = bench.scores(windows, Quantized(codes=codes, vectors={}), original=bench)
    return summarize(scores["variant"]).kl_nats


def lines(
    bench: Workbench,
    held_out: Int[Tensor, "held_out length"],
    text: Int[Tensor, "windows length"],
    budgets: Sequence[float],
) -> list[str]:
    """A line a budget."""
    measure = DEFAULT.allocation
    gathered = bench.gather(
        {measure: MEASURES[measure]},
        weightings=(DEFAULT.weighting,),
        candidates_by=DEFAULT.weighting,
        keep_candidates=True,
        with_outputs=True,
    )
    found = []
    for budget in budgets:
        plan = allocation.by_costs(gathered.costs[measure], budget_bits=budget)
        before = stitched(gathered.candidates, plan)
        after = bench.codes(plan.choices, DEFAULT, gathered)
        line = f"seed {bench.terms.seed}  {budget:5.2f} bits  costs {plan.cost_nats:.5f}"
        for name, windows in (("held out", held_out), ("text", text)):
            candidates, refined = (divergence(bench, windows, codes) for codes in (before, after))
            line += f"  {name}: candidates {candidates:.5f} refined {refined:.5f} ({refined / candidates:.2f})"
        found.append(line)
        print(found[-1], flush=True)
    return found


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
    tokenizer, source = AutoTokenizer.from_pretrained(arguments.model), open_source(arguments.model)
    text = load_windows(
        parse_source(f"text:{arguments.text}"),
        tokenizer,
        num_windows=arguments.text_windows,
        length=arguments.length,
        seed=0,
        placement="spread",
    ).tokens
    for seed in map(int, arguments.seeds.split(",")):
        drawn = load_windows(
            parse_source(f"text:{arguments.calibration}"),
            tokenizer,
            num_windows=arguments.windows + default_held_out(arguments.windows),
            length=arguments.length,
            seed=seed,
        )
        calibration, held_out = split_held_out(drawn, num_windows=arguments.windows)
        cut = cut_of(
            device=arguments.device,
            num_windows=len(calibration.tokens),
            length=arguments.length,
            hidden=source.config.hidden_size,
        )
        terms = Terms(
            bits=(2, 3, 4, 5, 6, 8),
            group_sizes=(64, -1),
            scale_bits=arguments.scale_bits,
            seed=seed,
            device=arguments.device,
            shards=cut.shards,
            micro_batch=cut.micro_batch,
        )
        bench = Workbench(source, calibration.tokens, terms, held_out=held_out).scaled()
        lines(bench, held_out, text, [float(part) for part in arguments.budgets.split(",")])


if __name__ == "__main__":
    main()
