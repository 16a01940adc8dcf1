"""Correct one layer for the errors before it, quantize it, and keep of every row what is better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lrpq.model.layers import Choice
from lrpq.quant.correction import correct, target_error
from lrpq.quant.factor import Factor, factorize
from lrpq.quant.gptq import gptq
from lrpq.quant.grid import Grid, QuantizedWeight
from lrpq.quant.hessian import damped_cholesky, normalized
from lrpq.quant.polish import polish
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
    polish_rounds: int = 2,
    grid: Grid = Grid.SIGNED,
    name: str,
) -> Refined:
    """GPTQ on the inputs of the quantized prefix, after a correction towards the original outputs; then polished.

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
        polish_rounds: rounds of coordinate descent on the codes and a refit of the scales, after rounding and the
            choice of rows, towards what each row was rounded from; 0 leaves out.
        grid: signed or symmetric.
        name: module name for errors.
    """
    C = normalized(products.hessian, name=name).to(W.device)
    factor = factorize(C, damping=damping, name=name)
    if products.shift is None or strength == 0.0:
        target, weight, rejected, steps = W, gptq(W, factor, [choice], grid=grid, name=name)[0], 0, 0
    else:
        target, weight, rejected, steps = _corrected(
            W, products, C, factor, choice, strength=strength, damping=correction_damping, grid=grid, name=name
        )
    polished = polish(target, [weight], C, rounds=polish_rounds, name=name)[0] if polish_rounds else None
    return Refined(
        weight=weight if polished is None else polished.weight,
        rejected_rows=rejected,
        rows=W.shape[0],
        damping_steps=factor.num_damping_steps + steps,
        dead_inputs=factor.num_dead,
    )


def _corrected(
    W: Float[Tensor, "d_out d_in"],
    products: SiteProducts,
    C: Float[Tensor, "d_in d_in"],
    factor: Factor,
    choice: Choice,
    *,
    strength: float,
    damping: float,
    grid: Grid,
    name: str,
) -> tuple[Tensor, QuantizedWeight, int, int]:
    """What each row was rounded from, its codes, the number of rows not corrected, and steps of damping."""
    assert products.shift is not None
    D = products.shift.to(W.device) / products.hessian.weight_sum
    WD = W @ D
    cholesky = damped_cholesky(C, damping=damping, name=name)
    corrected = correct(W, D, C, strength=strength, cholesky=cholesky, WD=WD, name=name)
    both = gptq(torch.cat([W, corrected]), factor, [choice], grid=grid, name=name)[0]
    d_out = W.shape[0]
    Q = both.dequantize(torch.float32)
    kept = target_error(W, Q[d_out:], C, D, WD=WD) <= target_error(W, Q[:d_out], C, D, WD=WD)
    rows = torch.arange(d_out, device=W.device) + torch.where(kept, d_out, 0)
    weight = QuantizedWeight(codes=both.codes[rows], scales=both.scales[rows], choice=choice)
    target = torch.where(kept.unsqueeze(1), corrected, W)
    return target, weight, d_out - int(kept.sum()), cholesky.num_damping_steps
