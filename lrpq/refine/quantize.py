"""Correct one layer for the errors before it, quantize it, and keep of every row what is better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lrpq.model.layers import Choice
from lrpq.quant.correction import correct, target_error
from lrpq.quant.gptq import factorize, gptq
from lrpq.quant.grid import Grid, QuantizedWeight
from lrpq.quant.hessian import damped_cholesky, normalized
from lrpq.refine.sweep import SiteProducts

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Refined:
    """A quantized layer and how it went."""

    weight: QuantizedWeight
    rejected_rows: int
    """Rows whose corrected weights were worse on their own calibration error: these are not corrected."""
    rows: int
    damping_steps: int
    """How often the damping, GPTQ's or the correction's, was raised because C was not positive definite."""
    dead_inputs: int


def quantize_refined(
    W: Float[Tensor, "d_out d_in"],
    products: SiteProducts,
    choice: Choice,
    *,
    strength: float,
    damping: float = 0.01,
    correction_damping: float = 0.1,
    grid: Grid = Grid.SIGNED,
    name: str,
) -> Refined:
    """GPTQ on the inputs of the quantized prefix, after a correction towards the original outputs.

    The corrected target is W + a W D (C + damping)^-1 . A row's calibration error is the weighted distance
    between its original output on original inputs and its quantized output on the real inputs; each row keeps the
    better of the corrected and the plain codes. Rows do not interact in GPTQ, so this guard can act on each.

    Args:
        W: original weights, float32.
        products: C and D of its input site, all shards merged.
        choice: bits and group size.
        strength: a in the formula; 0 corrects nothing.
        damping: share of the mean diagonal of C that GPTQ adds to it.
        correction_damping: the same for the correction, which needs more: it fits d_in numbers a row to the
            calibration tokens, and a held-out text pays for what it fits of their noise (docs/log.md).
        grid: signed or symmetric.
        name: module name for errors.
    """
    C = normalized(products.hessian, name=name).to(W.device)
    factor = factorize(C, damping=damping, name=name)
    if products.shift is None or strength == 0.0:
        return Refined(
            weight=gptq(W, factor, [choice], grid=grid, name=name)[0],
            rejected_rows=0,
            rows=W.shape[0],
            damping_steps=factor.num_damping_steps,
            dead_inputs=factor.num_dead,
        )
    D = products.shift.to(W.device) / products.hessian.weight_sum
    WD = W @ D
    cholesky = damped_cholesky(C, damping=correction_damping, name=name)
    corrected = correct(W, D, C, strength=strength, cholesky=cholesky, WD=WD, name=name)
    both = gptq(torch.cat([W, corrected]), factor, [choice], grid=grid, name=name)[0]
    d_out = W.shape[0]
    Q = both.dequantize(torch.float32)
    kept = target_error(W, Q[d_out:], C, D, WD=WD) <= target_error(W, Q[:d_out], C, D, WD=WD)
    rows = torch.arange(d_out, device=W.device) + torch.where(kept, d_out, 0)
    return Refined(
        weight=QuantizedWeight(codes=both.codes[rows], scales=both.scales[rows], choice=choice),
        rejected_rows=d_out - int(kept.sum()),
        rows=d_out,
        damping_steps=factor.num_damping_steps + cholesky.num_damping_steps,
        dead_inputs=factor.num_dead,
    )
