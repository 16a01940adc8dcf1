"""Second-order costs: 1/2 dW^T (curvature) dW, with the curvature from one backward pass or another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrpq.importance.evidence import Costs, ModuleEvidence
from lrpq.quant.gptq import predicted_cost
from lrpq.quant.grid import QuantizedWeight
from lrpq.quant.matched_curvature import matched_curvature, trace_of
from lrpq.quant.sampled_cost import sampled_costs
from lrpq.relevance.rules import Pass

if TYPE_CHECKING:
    from jaxtyping import Float


def pipeline(weighting: str) -> Costs:
    """The cost that `lrpq compress` allocates by: curvature of the true gradient, H of the run's token weights; nats.

    1/2 sum_j c_j dW_j H dW_j^T (docs/methods.md, section 1).
    """

    def costs(evidence: ModuleEvidence) -> list[float]:
        return predicted_cost(
            evidence.W, evidence.candidates, evidence.hessians[weighting], _matched(evidence, weighting)
        )

    return costs


def _matched(evidence: ModuleEvidence, weighting: str) -> Float[Tensor, "rows=d_out"]:
    H = evidence.hessians[weighting]
    return matched_curvature(evidence.curvature[Pass.FISHER], evidence.bounded_trace, trace_of(H))


def sampled(weighting: str) -> Costs:
    """The same from GPTQ on a few rows of each module (lrpq.quant.sampled_cost); nats."""

    def costs(evidence: ModuleEvidence) -> list[float]:
        return sampled_costs(
            [evidence.W],
            [_matched(evidence, weighting)],
            evidence.factor,
            [q.choice for q in evidence.candidates],
            evidence.hessians[weighting],
            grid=evidence.grid,
            name=evidence.spec.name,
        )[0]

    return costs


def fisher(evidence: ModuleEvidence) -> list[float]:
    """Curvature and token weights from the true gradient; nats."""
    return _curvature(Pass.FISHER, "fisher")(evidence)


def lrp(evidence: ModuleEvidence) -> list[float]:
    """The same from AttnLRP's modified gradient (Achtibat et al. 2024)."""
    return _curvature(Pass.LRP, "lrp")(evidence)


def cp_lrp(evidence: ModuleEvidence) -> list[float]:
    """The same from CP-LRP's modified gradient (Ali et al. 2022); q, k and gates, constants there, cost nothing."""
    return _curvature(Pass.CP_LRP, "cp-lrp")(evidence)


def blend(evidence: ModuleEvidence) -> list[float]:
    """Geometric mean of the curvatures of the true gradient and of AttnLRP's, with the blend of the token weights."""
    c = (evidence.curvature[Pass.FISHER] * evidence.curvature[Pass.LRP]).sqrt()
    return predicted_cost(evidence.W, evidence.candidates, evidence.hessians["blend"], c)


def hessian_trace(evidence: ModuleEvidence) -> list[float]:
    """HAWQ-V2 (Dong et al. 2020, arXiv:1911.03852): mean of the Hessian's diagonal times |dW|^2, dW of plain rounding.

    The trace is that of the Fisher information, exact over the tokens, instead of Hutchinson's estimate of the loss
    Hessian's: the two agree in expectation for a model that fits its own labels.
    """
    mean = evidence.trace / evidence.W.numel()
    return [0.5 * mean * squared_error(evidence.W, q) for q in evidence.rounded]


def squared_error(W: Float[Tensor, "d_out d_in"], quantized: QuantizedWeight) -> float:
    """|W - Q|^2, sums in float64."""
    return float((W - quantized.dequantize(W.dtype)).square().sum(dtype=torch.float64))


def local_loss(W: Float[Tensor, "d_out d_in"], candidates: Sequence[QuantizedWeight], H: Tensor) -> list[float]:
    """tr(dW H dW^T) of each candidate: the layer's own output error, which knows nothing of what follows."""
    ones = torch.ones(W.shape[0], dtype=torch.float64, device=W.device)
    return [2 * cost for cost in predicted_cost(W, candidates, H, ones)]


def _curvature(running: Pass, weighting: str) -> Costs:
    def costs(evidence: ModuleEvidence) -> list[float]:
        return predicted_cost(
            evidence.W, evidence.candidates, evidence.hessians[weighting], evidence.curvature[running]
        )

    return costs
