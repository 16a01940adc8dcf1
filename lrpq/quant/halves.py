"""A product of float32 matrices as three of their bfloat16 halves, for GPUs, whose bfloat16 is some 15 times as fast.

x = high + low with high = bfloat16(x), low = bfloat16(x - high) keeps 16 of 24 binary digits. Of the four products of
halves low times low is below what the others round, and is left out. All three are one product with a threefold inner
dimension, summed in float32.

For the column loop's updates that is enough: with the large ones by halves, over random, ill-conditioned and
rank-deficient Hessians with outliers, at 2 to 8 bits, the undamped loss differs from float64's by at most 1.3e-4, as
float32's own does (1.0e-4; TF32 alone 1.0e-3, bfloat16 alone 1.8e-3; docs/log.md); with all of them so, on a real
model's Hessians, by at most 1.4e-4 (docs/gpu.md). Costs differ by at most 1.4e-4 (quant/forms.py). Descent, joint
errors and the losses of rows that a guard compares are taken so too: what they decide there differs by more than that,
or does not matter. A row of which much cancels is less exact. The factorisation stays in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lrpq.kernels.threads import usable
from lrpq.quant.activation_sums import split

if TYPE_CHECKING:
    from jaxtyping import BFloat16, Float
    from torch import Tensor

LEAST_WORK = 2**33  # multiply-adds from which a product outweighs the splitting: a third of a millisecond in float32
_COLUMNS = 8192  # at once: halves and their product are temporaries
SPLIT_WHOLE = 8192
"""Columns up to which a matrix that takes part in many products is split once for all of them: 400 MB at most."""
_NARROW_COLUMNS = 1024  # the same where B is as long as a Hessian and there is nothing to gain from wider parts


def by_halves(C: Tensor, inner: int) -> bool:
    """Whether a product of this shape with ``inner`` summands an entry is computed by halves."""
    return C.is_cuda and usable(C) and C.numel() * inner >= LEAST_WORK


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


def add_in_parts(C: Float[Tensor, "m n"], A: Float[Tensor, "m k"], B: Float[Tensor, "k n"]) -> None:
    """``add_product`` in less memory."""
    add_product(C, A, B, columns_at_once=_NARROW_COLUMNS)


def multiplied(A: Float[Tensor, "m k"], B: Float[Tensor, "k n"]) -> Float[Tensor, "m n"]:
    """A B, by halves where that is worth it."""
    C = A.new_empty(len(A), B.shape[1])
    if not by_halves(C, len(B)):
        return torch.mm(A, B, out=C)
    add_in_parts(C.zero_(), A, B)
    return C


def interleaved(A: Float[Tensor, "k n"]) -> BFloat16[Tensor, "triple n"]:
    """Of every row its leading digits twice, and what they leave: what ``add_interleaved`` multiplies with errors."""
    found = torch.empty(len(A), 3, A.shape[1], dtype=torch.bfloat16, device=A.device)
    found[:, 0] = A
    found[:, 1] = found[:, 0]
    torch.sub(A, found[:, 0], out=found[:, 2])
    return found.view(-1, A.shape[1])


def add_interleaved(C: Float[Tensor, "m n"], A: BFloat16[Tensor, "triple m"], D: BFloat16[Tensor, "triple n"]) -> None:
    """C += A^T D by halves that are split already, in place, in one product: nothing else goes through memory.

    Args:
        C: contiguous rows.
        A: ``interleaved``.
        D: of every row its leading digits, what they leave, and the leading ones again, as the kernels for columns
            write errors.
    """
    if C.is_cuda:
        torch.addmm(C, A.T, D, out_dtype=torch.float32, out=C)
    else:
        C.addmm_(A.T.float(), D.float())


def product(a: BFloat16[Tensor, "m k"], b: BFloat16[Tensor, "k n"]) -> Float[Tensor, "m n"]:
    """Sums in float32. A CPU has no such call; there, for tests, the halves are widened, which changes no product."""
    if a.is_cuda:
        found: Tensor = torch.mm(a, b, out_dtype=torch.float32)
        return found
    return a.float() @ b.float()
