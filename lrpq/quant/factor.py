"""What GPTQ needs of a Hessian: the triangular factor R with R R^T = H + damping, and the order of the columns.

lrpq/quant/gptq.py says why R and not the inverse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lrpq.quant.hessian import factor_damped

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

_PERMUTED_ELEMENTS = 2**26
"""At once: a second copy of these only is made meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """What GPTQ needs of a Hessian; computed once for all layers and bit widths that read the same input."""

    R: Float[Tensor, "d_in d_in"]
    """Upper triangular, unit diagonal: the factor of the damped, permuted H with column k divided by R_kk."""
    diagonal: Float[Tensor, "columns=d_in"]
    """R_kk before the division, in the order of the sweep."""
    order: Int[Tensor, "columns=d_in"]
    """Original column index of each step of the sweep."""
    importance: Float[Tensor, "columns=d_in"]
    """diag(H), undamped, in the original order: the weights of the scale search."""
    damping: float
    """Added to every diagonal entry, in units of H."""
    num_damping_steps: int
    """How often the damping had to grow tenfold before the factorisation succeeded."""
    num_dead: int
    """Inputs that were zero on all calibration tokens; their columns are rounded to nearest."""


def factorize(
    H: Float[Tensor, "d_in d_in"], *, damping: float = 0.01, act_order: bool = True, name: str = "layer"
) -> Factor:
    """Factor the damped Hessian for the sweep. d^3/3 FLOPs (see the module's text), dtype and device of H.

    Memory besides H and the result: once as much as H.

    ``act_order``: columns by falling diag H, ties by index (static activation order: group scales do not
    move); otherwise from left to right. ``damping`` is relative to the mean of diag H over live inputs.

    Raises QuantizationError naming the layer if H is not finite or stays indefinite (``factor_damped``).
    """
    importance = H.diagonal().clone()
    if act_order:
        order = torch.argsort(importance, descending=True, stable=True)
    else:
        order = torch.arange(len(H), device=H.device)
    backwards = order.flip(0)
    cholesky = factor_damped(_permuted(H, backwards), damping=damping, name=name)
    R = cholesky.L.flip(0, 1)
    diagonal = R.diagonal().clone()
    return Factor(
        R=R.div_(diagonal),
        diagonal=diagonal,
        order=order,
        importance=importance,
        damping=cholesky.damping,
        num_damping_steps=cholesky.num_damping_steps,
        num_dead=cholesky.num_dead,
    )


def _permuted(H: Float[Tensor, "d_in d_in"], order: Int[Tensor, "columns=d_in"]) -> Float[Tensor, "d_in d_in"]:
    """Rows and columns in another order, in new memory; of a large matrix some rows at a time."""
    step = max(1, _PERMUTED_ELEMENTS // max(1, len(H)))
    if step >= len(H):
        return H[order][:, order]
    permuted = torch.empty_like(H)
    for start in range(0, len(H), step):
        rows = slice(start, start + step)
        permuted[rows] = H[order[rows]][:, order]
    return permuted
