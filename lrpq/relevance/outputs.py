"""Second moments of the gradients at a layer's outputs, for rounding that knows how outputs work together.

    G = sum_t g_t g_t^T / |g_t|

A token counts with |g_t|, not with |g_t|^2, for the reason that token weights have a power of 1/2: few tokens carry
most of the squared gradient, and a sum that they rule is noise on other text (docs/log.md compares the two).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lrpq.quant.activation_sums import MIN_GPU_ROWS, add_sum, is_split

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

CHUNK_ROWS = 4096
"""Outputs of which G holds all pairs; pairs across chunks are left out, so that wide layers stay small: 64 MB each."""

Outputs = list["Tensor"]
"""G of every chunk of consecutive outputs, float32."""


def empty_outputs(d_out: int, device: torch.device | str) -> Outputs:
    """Zeros for a layer."""
    sizes = [min(CHUNK_ROWS, d_out - start) for start in range(0, d_out, CHUNK_ROWS)]
    return [torch.zeros(size, size, dtype=torch.float32, device=device) for size in sizes]


def num_chunks(d_out: int) -> int:
    """Chunks of a layer."""
    return -(-d_out // CHUNK_ROWS)


def add_outputs(total: Outputs, g: Float[Tensor, "tokens d_out"]) -> None:
    """Add tokens' gradients in place. 2 tokens c d_out FLOPs for chunks of c rows; where products are split, a quarter
    of them less for chunks of 4,096."""
    start = 0
    if is_split(g):
        norm = torch.linalg.vector_norm(g, dim=1, keepdim=True, dtype=torch.float32)
        inverse = torch.where(norm > 0, 1 / norm, 0.0)
        for G in total:
            _add_split(G, g[:, start : start + len(G)], inverse)
            start += len(G)
        return
    wide = g.float()
    norm = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    scaled = wide * torch.where(norm > 0, norm.rsqrt(), 0.0)
    for G in total:
        part = scaled[:, start : start + len(G)]
        G.addmm_(part.T, part)
        start += len(G)


def _add_split(
    G: Float[Tensor, "chunk chunk"], g: Float[Tensor, "tokens chunk"], inverse: Float[Tensor, "tokens one"]
) -> None:
    """``G += (g inverse)^T g``: blocks of rows from the diagonal to the right, and below it what they are mirrored."""
    for top in range(0, len(G), MIN_GPU_ROWS):
        rows = slice(top, top + MIN_GPU_ROWS)
        add_sum(G[rows, top:], g[:, rows] * inverse, g[:, top:])
        G[rows.stop :, rows] = G[rows, rows.stop :].T


def merge_outputs(left: Outputs, right: Outputs) -> Outputs:
    """Sum of two disjoint sets of tokens."""
    return [a + b for a, b in zip(left, right, strict=True)]


def merge_outputs_into(left: Outputs, right: Outputs) -> Outputs:
    """The same sum in the memory of ``left``, which nobody else may hold."""
    return [a.add_(b) for a, b in zip(left, right, strict=True)]
