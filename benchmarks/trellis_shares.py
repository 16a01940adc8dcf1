"""What share of a uniform grid's loss a trellis leaves, layer by layer: where `lrpq.quant.trellis.SHARES` is from.

    python -m benchmarks.trellis_shares MODEL --calibration FILE [--blocks 4,20] [--windows 16] [--length 512]
        [--scale-bits 8] [--group-sizes 64,-1] [--device cpu]

GPTQ of every layer of some blocks on the original inputs, with lrpq's token weights, on uniform grids and with trellis
codes of the same widths and group sizes. Prints a line a layer, and geometric means.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import torch

from benchmarks.benches import BenchTerms, numbers, workbench
from lrpq.allocate.trellis import takes_trellis, with_trellis
from lrpq.compare.recipes import DEFAULT
from lrpq.compare.workbench import Workbench
from lrpq.importance.asked import asked_by
from lrpq.importance.registry import MEASURES
from lrpq.model.layers import Choice
from lrpq.quant.factor import factorize
from lrpq.quant.gptq import gptq, predicted_cost
from lrpq.quant.hessian import normalized
from lrpq.quant.trellis import WIDTHS


def shares(bench: Workbench, blocks: frozenset[int]) -> Iterator[tuple[str, dict[Choice, float]]]:
    """Layers of the blocks, last block first, and the share at every choice of a trellis."""
    stream, terms = bench.stream(), bench.terms
    measures = {DEFAULT.allocation: MEASURES[DEFAULT.allocation]}
    asked = asked_by(measures, (), candidates_by=DEFAULT.weighting, with_outputs=False)
    for block, evidence in zip(range(stream.num_blocks - 1, -1, -1), bench.evidence(asked, stream=stream), strict=True):
        for site, specs in stream.sites(block).items() if block in blocks else ():
            H = normalized(evidence.hessians[DEFAULT.weighting][site], name=specs[0].name)
            factor = factorize(H, damping=terms.damping, name=specs[0].name)
            for spec in filter(takes_trellis, specs):
                W = stream.weight(spec)
                rows = torch.ones(len(W), device=W.device)
                uniform = [choice for choice in bench.fitting(spec) if choice.bits in WIDTHS]
                costs = [
                    predicted_cost(W, gptq(W, factor, choices, grid=terms.grid, name=spec.name), H, rows)
                    for choices in (uniform, list(map(with_trellis, uniform)))
                ]
                yield spec.name, {c: b / a for c, a, b in zip(uniform, *costs, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--blocks", type=numbers, default=(4, 20))
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--group-sizes", type=numbers, default=(64, -1))
    parser.add_argument("--scale-bits", type=int, default=16, choices=(8, 16))
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    terms = BenchTerms(
        model=arguments.model,
        calibration=arguments.calibration,
        windows=arguments.windows,
        length=arguments.length,
        bits=WIDTHS,
        group_sizes=arguments.group_sizes,
        scale_bits=arguments.scale_bits,
        device=arguments.device,
    )
    bench, _ = workbench(terms, seed=0)
    found: dict[Choice, list[float]] = {}
    for name, by_choice in shares(bench.scaled(), frozenset(arguments.blocks)):
        print(f"{name}: " + ", ".join(f"{choice} {share:.3f}" for choice, share in by_choice.items()), flush=True)
        for choice, share in by_choice.items():
            found.setdefault(choice, []).append(share)
    for choice, of_layers in found.items():
        mean = math.exp(fmean(map(math.log, of_layers)))
        print(f"{choice}: {mean:.3f}, {min(of_layers):.3f} to {max(of_layers):.3f} in {len(of_layers)} layers")


if __name__ == "__main__":
    main()
