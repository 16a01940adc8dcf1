"""Sums of products of activations in fp32, on a GPU at the speed of bfloat16.

A GPU multiplies bfloat16 with fp32 sums some fifteen times as fast as fp32. Activations of a bfloat16 model are such
numbers already; what they are multiplied with (weighted activations, differences of two streams, normalised gradients)
is fp32. Split into two bfloat16 numbers, its leading 8 bits and the 8 bits after them, it loses 2^-17 of itself,
and two products take the place of one. On an H100 sums over 4,096 tokens differ from float64's by 2 to 6e-7 of the mean
diagonal (plain fp32: 1e-8; one bfloat16 product alone: 3e-5; tests/reference/test_gpu_sums_reference.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

_CHANNELS = 2048
MIN_GPU_ROWS = 2048
"""Of blocks into which a symmetric product is cut: thinner ones leave most of a GPU idle."""


def is_split(exact: Tensor) -> bool:
    """Whether a product with these activations is taken in two parts."""
    return exact.is_cuda and exact.dtype is torch.bfloat16


def add_sum(
    total: Float[Tensor, "m n"],
    wide: Float[Tensor, "tokens m"],
    exact: Float[Tensor, "tokens n"],
    *,
    rounded: bool = False,
) -> Float[Tensor, "m n"]:
    """``total += wide^T exact`` in place, fp32.

    Args:
        total: fp32.
        wide: fp32.
        exact: in the model's dtype; on a GPU bfloat16 stays what it is, everything else is widened.
        rounded: on a GPU ``wide`` is rounded to bfloat16, for half of the work. Its errors of 2^-9 are independent of
            each other; a matrix that is to be inverted needs more digits.
    """
    if not is_split(exact):
        return total.addmm_(wide.T, exact.float())
    for part in (wide.to(torch.bfloat16),) if rounded else split(wide):
        total.add_(torch.mm(part.T, exact, out_dtype=torch.float32))
    return total


def split(wide: Float[Tensor, "*shape"]) -> tuple[Tensor, Tensor]:
    """Two bfloat16 numbers whose sum is within 2^-17 of an fp32 one."""
    high = wide.to(torch.bfloat16)
    return high, (wide - high).to(torch.bfloat16)


def token_squares(g: Float[Tensor, "tokens d"]) -> Float[Tensor, "rows=tokens"]:
    """Sum of the squares of each token's activations, in fp32 (fp64 for fp64) and without a copy in it."""
    return torch.linalg.vector_norm(g, dim=-1, dtype=torch.promote_types(g.dtype, torch.float32)).square_()


def channel_squares(g: Float[Tensor, "tokens d"]) -> Float[Tensor, "columns=d"]:
    """Sum over tokens of the squares of each channel, bfloat16 on a GPU, in fp64; some are copied at a time."""
    norms = [torch.linalg.vector_norm(part, dim=0, dtype=torch.float64) for part in g.split(_CHANNELS, dim=1)]
    return torch.cat(norms).square_()
