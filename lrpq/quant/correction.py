"""Weights corrected for the quantized layers before them, and the calibration error that judges a correction.

Behind a quantized prefix a layer reads Xq instead of X. With x and xq the inputs of one token and e_t what the output
W xq_t lacks,

    C = sum_t s_t xq_t xq_t^T / sum_t s_t,   P = sum_t s_t e_t xq_t^T / sum_t s_t,

the least-squares weights for the targets W xq + e on the inputs xq are W + P C^-1. The target of most layers is their
original output W x: then e = W (x - xq) and P = W D with D = sum_t s_t (x_t - xq_t) xq_t^T / sum_t s_t. A layer that
adds to the hidden states r is to bring these back to the original's: e = W (x - xq) + r - rq.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrpq.errors import QuantizationError
from lrpq.quant.gptq import loss
from lrpq.quant.hessian import DampedCholesky

if TYPE_CHECKING:
    from jaxtyping import Float


def correct(
    W: Float[Tensor, "d_out d_in"],
    P: Float[Tensor, "d_out d_in"],
    *,
    strength: float = 0.5,
    cholesky: DampedCholesky,
    name: str = "layer",
) -> Float[Tensor, "d_out d_in"]:
    """Corrected weights W + strength P (C + damping)^-1, in P's dtype; quantize them with C as Hessian.

    ``strength`` 1 would fit the calibration tokens exactly (up to damping) and overfits. Layers that share an
    input share ``cholesky = damped_cholesky(C, damping=damping)``, which also counts how often the damping
    had to grow.

    Raises QuantizationError naming the layer if the result is not finite.
    """
    change = _solved(P, cholesky.L)
    corrected = torch.add(W.to(P.dtype), change, alpha=strength)
    if not bool(torch.isfinite(corrected.sum(dtype=torch.float64))):
        raise QuantizationError(f"{name}: its correction is not finite; check the inputs behind the quantized prefix")
    return corrected


def _solved(P: Float[Tensor, "d_out d_in"], L: Float[Tensor, "d_in d_in"]) -> Float[Tensor, "d_out d_in"]:
    """P (L L^T)^-1. On a GPU by its two halves: ``cholesky_solve`` would copy L, which can be 3 GB."""
    if not P.is_cuda:
        return torch.cholesky_solve(P.T, L).T
    half = torch.linalg.solve_triangular(L, P.T, upper=False)
    return torch.linalg.solve_triangular(L.T, half, upper=True).T


def target_error(
    W: Float[Tensor, "d_out d_in"],
    Q: Float[Tensor, "d_out d_in"],
    C: Float[Tensor, "d_in d_in"],
    P: Float[Tensor, "d_out d_in"],
) -> Float[Tensor, "rows=d_out"]:
    """Weighted calibration error of every row, mean_t |W xq_t + e_t - Q xq_t|^2, up to a term in e alone; float64.

    W are the original weights, Q those used behind the quantized prefix. With dW = Q - W the error is e - dW xq, and
    its mean square, but for the first part's own: diag(dW C dW^T) - 2 diag(P dW^T). It may be
    negative and only differences between two Q have a meaning: this is what the guard of the correction compares.
    Written in dW the terms do not cancel, so products in C's dtype suffice, and large ones on a GPU by halves; the rest
    is float64.
    """
    W = W.to(C.dtype)
    dW = Q.to(C.dtype) - W
    return loss(W, Q, C) - 2 * (P.double() * dW.double()).sum(1)
