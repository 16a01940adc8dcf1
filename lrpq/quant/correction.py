"""Weights corrected for the quantized layers before them, and the calibration error that judges a correction.

Behind a quantized prefix a layer reads Xq instead of X. With x and xq the inputs of one token,

    C = sum_t s_t xq_t xq_t^T / sum_t s_t,   D = sum_t s_t (x_t - xq_t) xq_t^T / sum_t s_t,

the least-squares weights for the targets W x on the inputs xq are W + W D C^-1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrpq.errors import QuantizationError
from lrpq.quant.gptq import loss
from lrpq.quant.hessian import DampedCholesky, damped_cholesky

if TYPE_CHECKING:
    from jaxtyping import Float


def correct(
    W: Float[Tensor, "d_out d_in"],
    D: Float[Tensor, "d_in d_in"],
    C: Float[Tensor, "d_in d_in"],
    *,
    strength: float = 0.5,
    damping: float = 0.01,
    cholesky: DampedCholesky | None = None,
    WD: Float[Tensor, "d_out d_in"] | None = None,
    name: str = "layer",
) -> Float[Tensor, "d_out d_in"]:
    """Corrected weights W + strength W D (C + damping)^-1, in C's dtype; quantize them with C as Hessian.

    ``strength`` 1 would fit the calibration tokens exactly (up to damping) and overfits. Layers that share an
    input share ``cholesky = damped_cholesky(C, damping=damping)``, which also counts how often the damping
    had to grow; without it the factor is computed here. ``WD`` is the product W D, where the caller has it.

    Raises QuantizationError naming the layer if C stays indefinite or the result is not finite.
    """
    factor = damped_cholesky(C, damping=damping, name=name) if cholesky is None else cholesky
    W = W.to(C.dtype)
    change = torch.cholesky_solve((W @ D if WD is None else WD).T, factor.L).T
    corrected = torch.add(W, change, alpha=strength)
    if not bool(torch.isfinite(corrected.sum(dtype=torch.float64))):
        raise QuantizationError(f"{name}: its correction is not finite; check the inputs behind the quantized prefix")
    return corrected


def target_error(
    W: Float[Tensor, "d_out d_in"],
    Q: Float[Tensor, "d_out d_in"],
    C: Float[Tensor, "d_in d_in"],
    D: Float[Tensor, "d_in d_in"],
    *,
    WD: Float[Tensor, "d_out d_in"] | None = None,
) -> Float[Tensor, "rows=d_out"]:
    """Weighted calibration error of every row, mean_t |W x_t - Q xq_t|^2, up to a term in W alone; float64.

    W are the original weights (the targets), Q those used behind the quantized prefix. With dW = Q - W the error is
    W (x - xq) - dW xq, and its mean square, but for the first part's own: diag(dW C dW^T) - 2 diag(W D dW^T). It may be
    negative and only differences between two Q have a meaning: this is what the guard of the correction compares.
    Written in dW the terms do not cancel, so matmuls in C's dtype suffice; the rest is float64. ``WD`` is the product
    W D, where the caller has it.
    """
    W = W.to(C.dtype)
    dW = Q.to(C.dtype) - W
    shift = W @ D if WD is None else WD
    return loss(W, Q, C) - 2 * (shift.double() * dW.double()).sum(1)
