"""GPTQ with several scales, and of each row the result with the lowest error.

No search before rounding knows what GPTQ will make of a scale. Scales that are a few percent smaller or larger cost
nothing but further choices in the same sweep, and since rows do not interact, each may keep its own.

For study (benchmarks/after_rounding.py): on top of a polish it wins 1 to 2% for four more column loops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrpq.errors import QuantizationError
from lrpq.model.layers import Choice
from lrpq.quant.factor import Factor
from lrpq.quant.gptq import gptq, loss
from lrpq.quant.grid import Grid, QuantizedWeight

if TYPE_CHECKING:
    from jaxtyping import Float

# Of .85 .. 1.1, those that some rows choose often; the searched scale comes first, so that it wins ties.
MULTIPLIERS = (1.0, 0.93, 0.96, 1.04, 1.08)


def gptq_best_rows(
    W: Float[Tensor, "d_out d_in"],
    factor: Factor,
    choices: Sequence[Choice],
    H: Float[Tensor, "d_in d_in"],
    *,
    scales: Sequence[Float[Tensor, "d_out groups"]],
    multipliers: Sequence[float] = MULTIPLIERS,
    grid: Grid = Grid.SYMMETRIC,
    name: str = "layer",
) -> list[QuantizedWeight]:
    """GPTQ at every scale times every multiplier; each row keeps the codes and scales of least error under H.

    H is the undamped Hessian of the factor. Ties go to the multiplier that is named first. Costs, and holds the codes
    of, as many choices as ``choices`` times ``multipliers``, and one ``loss`` for each.

    Raises QuantizationError naming the layer without multipliers, and what ``gptq`` raises.
    """
    if any(choice.trellis for choice in choices):
        raise QuantizationError(f"{name}: rows of a trellis share streams, so that none can keep a scale of its own")
    if not multipliers or len(scales) != len(choices):
        raise QuantizationError(f"{name}: give at least one multiplier, and one tensor of scales for each choice")
    W = W.to(factor.R.dtype)
    trials = gptq(
        W,
        factor,
        [choice for choice in choices for _ in multipliers],
        scales=[s.to(W.dtype) * m for s in scales for m in multipliers],
        grid=grid,
        name=name,
    )
    step = len(multipliers)
    return [_best(W, trials[i * step : (i + 1) * step], H) for i in range(len(choices))]


def _best(W: Tensor, trials: Sequence[QuantizedWeight], H: Tensor) -> QuantizedWeight:
    best = trials[0]
    least = loss(W, best.dequantize(H.dtype), H)
    for trial in trials[1:]:
        error = loss(W, trial.dequantize(H.dtype), H)
        better = (error < least).unsqueeze(1)
        best = replace(
            best,
            codes=torch.where(better, trial.codes, best.codes),
            scales=torch.where(better, trial.scales, best.scales),
        )
        least = torch.minimum(error, least)
    return best
