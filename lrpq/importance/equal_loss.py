"""BAQ (2025): bits at which every layer loses the same."""

from __future__ import annotations

from lrpq.importance.curvature import local_loss
from lrpq.importance.evidence import Costs, ModuleEvidence


def equal_loss(weighting: str, *, at_bits: int) -> Costs:
    """Cost model of the equal-loss rule: D_l 4^(n - b), D_l the layer's own GPTQ loss at n bits.

    Minimising sum_l D_l 4^(n - b_l) under a limit on the mean of b_l gives b_l = R + 1/2 log2(D_l / GM(D)), each D_l
    taken per weight: the equal-loss solution. BAQ applies it to columns, whose fractional widths do not pack; here it
    is applied to modules, and the integer program rounds it under the budget.
    """

    def costs(evidence: ModuleEvidence) -> list[float]:
        nearest = min(evidence.candidates, key=lambda q: (abs(q.choice.bits - at_bits), q.choice.bits))
        (at,) = local_loss(evidence.W, [nearest], evidence.hessians[weighting])
        return [at * 4.0 ** (nearest.choice.bits - q.choice.bits) for q in evidence.candidates]

    return costs
