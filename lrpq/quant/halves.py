"""A product of float32 matrices as three of their bfloat16 halves, for GPUs, whose bfloat16 is some 15 times as fast.

x = high + low with high = bfloat16(x), low = bfloat16(x - high) keeps 16 of 24 binary digits. Of the four products of
halves low times low is below what the others round, and is left out. All three are one product with a threefold inner
dimension, summed in float32.

For the column loop's updates and the descent's pulls that is enough: over random, ill-conditioned and rank-deficient
Hessians with outliers, at 2 to 8 bits, the undamped loss differs from float64's by at most 1.3e-4, as float32's own
does (1.0e-4; TF32 alone 1.0e-3, bfloat16 alone 1.8e-3; docs/log.md). So it is for losses of rows that are compared with
each other (1.5e-4; quant/forms.py). The factorisation stays in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lrpq.kernels.threads import usable
from lrpq.quant.activation_sums import split

if TYPE_CHECKING:
    from jaxtyping import BFloat16, Float
    from torch import Tensor

_LEAST_WORK = 2**33  # multiply-adds from which a product outweighs the splitting: a third of a millisecond in float32
_COLUMNS = 8192  # at once: halves and their product are temporaries
_NARROW_COLUMNS = 1024  # where B is a Hessian, whose halves may be larger than anything else that is held


def by_halves(C: Tensor, inner: int) -> bool:
    """Whether a product of this shape with ``inner`` summands an entry is computed by halves."""
    return C.is_cuda and usable(C) and C.numel() * inner >= _LEAST_WORK


def add_product(
    C: Float[Tensor, "m n"], A: Float[Tensor, "m k"], B: Float[Tensor, "k n"], *, columns_at_once: int = _COLUMNS
) -> None:
    """C += A B by halves, in place. Memory: A's halves, and of some columns B's halves and the product."""
    high, low = split(A)
    left = torch.cat([high, high, low], dim=1)
    for start in range(0, B.shape[1], columns_at_once):
        columns = slice(start, start + columns_at_once)
        high, low = split(B[:, columns])
        C[:, columns] += product(left, torch.cat([high, low, high]))


def add_pulled(C: Float[Tensor, "m n"], A: Float[Tensor, "m k"], H: Float[Tensor, "k n"]) -> None:
    """``add_product`` of a part of a Hessian, in less memory."""
    add_product(C, A, H, columns_at_once=_NARROW_COLUMNS)


def multiplied(A: Float[Tensor, "m k"], B: Float[Tensor, "k n"]) -> Float[Tensor, "m n"]:
    """A B, by halves where that is worth it."""
    if not (A.is_cuda and usable(A) and len(A) * B.numel() >= _LEAST_WORK):
        return A @ B
    C = A.new_zeros(len(A), B.shape[1])
    add_pulled(C, A, B)
    return C


def product(a: BFloat16[Tensor, "m k"], b: BFloat16[Tensor, "k n"]) -> Float[Tensor, "m n"]:
    """Sums in float32. A CPU has no such call; there, for tests, the halves are widened, which changes no product."""
    if a.is_cuda:
        found: Tensor = torch.mm(a, b, out_dtype=torch.float32)
        return found
    return a.float() @ b.float()
