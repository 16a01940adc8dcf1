"""Channel scales from weights and what their rows are worth: columns of one size.

A group of columns of a row has one scale, which its largest weights set; where columns are of unequal size, the small
ones are rounded as coarsely as the large ones. The factor 1 / size_j of column j, which what makes the site's inputs
gives up (`smoothing`), ends that, and the model computes what it did. Sizes of rows do not matter, for groups have
scales of their own. (Balancing a matrix so is Sinkhorn's and Knopp's; with two scales a weight it is SINQ, Mueller et
al. 2025, arXiv:2509.22944.)

    size_j = (mean_i |sqrt(c_i) w_ij|^p)^(1/p),   p = 2.5,

over the rows i of all layers of the site, and over the heads that share a factor; c_i is the curvature of the loss in
output i. Without it the large rows rule the mean, which are not the ones that matter: that was worse than no factors
(docs/log.md). A mean of squares knows too little of the largest weights, one of cubes of little else. Factors have
geometric mean 1 and are 2^(k/8), k whole: what is chosen fits a byte a channel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from lrpq.model.streaming import BlockStream
from lrpq.transform.folds import SkippedPair
from lrpq.transform.smoothing import Pair, PairScale, Smoothing, smoothable_pairs

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

ORDER = 2.5
"""p; swept 2, 2.5, 3 (docs/log.md)."""
STEPS = 8
"""Factors an octave: a channel ends within 2^(1/16), 4%, of the others."""
MAX_STEPS = 127
"""Of a factor, either way: 2^15.9."""


def search_equalizing(stream: BlockStream, curvature: Mapping[str, Float[Tensor, "rows=d_out"]]) -> Smoothing:
    """Factors for all sites that can be scaled; reads every weight of theirs once.

    Args:
        stream: the original.
        curvature: c of every module, in any unit.

    Raises:
        ModelError: the architecture is not supported; it says why.
    """
    scales: list[PairScale] = []
    skipped: list[SkippedPair] = []
    for block in range(stream.num_blocks):
        pairs, left_out = smoothable_pairs(stream, block)
        skipped += left_out
        for pair in pairs:
            weights = [stream.weight(layer) for layer in pair.layers]
            steps = equalizing_steps(pair, weights, [curvature[layer.name] for layer in pair.layers])
            scales.append(PairScale(pair=pair, factor=factor_of(steps), alpha=0.0))
    return Smoothing(scales=tuple(scales), skipped=tuple(skipped))


def equalizing_steps(
    pair: Pair,
    weights: Sequence[Float[Tensor, "d_out d_in"]],
    curvature: Sequence[Float[Tensor, "rows=d_out"]],
) -> Int[Tensor, "channels=factors"]:
    """k of every channel, int8; 0 for one that no weight reads, and for all where no gradient reaches the layers.

    Args:
        pair: the site.
        weights: of the pair's layers.
        curvature: c of their rows.
    """
    unit = max(float(c.max()) for c in curvature) or 1.0
    sums = torch.stack(
        [
            ((c.to(W.device).double() / unit).sqrt().unsqueeze(1) * W.double()).abs().pow(ORDER).sum(0).cpu()
            for W, c in zip(weights, curvature, strict=True)
        ]
    ).sum(0)
    sums = pair.by_head(sums).sum(1).flatten()
    live = sums > 0
    if not bool(live.any()):
        return torch.zeros(len(sums), dtype=torch.int8)
    logs = -sums.where(live, 1.0).log2() / ORDER
    steps = ((logs - logs[live].mean()) * STEPS).round().clamp(-MAX_STEPS, MAX_STEPS)
    return steps.where(live, 0.0).to(torch.int8)


def factor_of(steps: Int[Tensor, "channels=factors"]) -> Float[Tensor, "channels=factors"]:
    """2^(k/8), float64."""
    return torch.exp2(steps.double() / STEPS)
