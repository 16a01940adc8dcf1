"""Ranges by error search: how far the outliers of an activation are clipped.

Candidates are ranges between quantiles; the one whose quantized calibration activations have the least mean squared
error wins, for the tensor or for each channel. LRP-QViT (Ranjan & Savakis 2024) searches the shares .999, .9999 and
.99999 a channel, as RepQ-ViT does. Calibrated on few images, these quantiles are next to the extremes, and at four bits
the best range is far narrower: tighter shares are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from lrpq.activations.grids import ActivationGrid, LogarithmicGrid, UniformGrid, between, check_bits

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

SHARES = (1.0, 0.99999, 0.9999, 0.999, 0.998, 0.995, 0.99, 0.98, 0.96)
"""Of the values within the range at either end, widest first; 1 clips nothing."""
UNCLIPPED = (1.0,)
MAX_VALUES = 1 << 20
"""Of one tensor that quantiles are taken from, evenly strided; its extremes are those of all values."""
STEPS_PER_OCTAVE = (1, 2)


def search_channels(x: Float[Tensor, "tokens channels"], bits: int, *, shares: Sequence[float] = SHARES) -> UniformGrid:
    """A range for each channel."""
    ordered = x.sort(dim=0).values
    best = _grid(ordered, bits, shares[0])
    least = _channel_errors(x, best)
    for share in shares[1:]:
        grid = _grid(ordered, bits, share)
        errors = _channel_errors(x, grid)
        better = errors < least
        least = torch.where(better, errors, least)
        best = UniformGrid(
            bits=bits,
            scale=torch.where(better, grid.scale, best.scale),
            offset=torch.where(better, grid.offset, best.offset),
        )
    return best


def search_tensor(
    x: Float[Tensor, "*dims"],
    bits: int,
    *,
    shares: Sequence[float] = SHARES,
    low: float | None = None,
) -> UniformGrid:
    """One range for the tensor.

    Args:
        x: calibration activations.
        bits: of a code.
        shares: to choose from.
        low: bound below which nothing lies, as of GELU's outputs: ranges that begin there (shifted grids) compete too.
            By default a range is clipped at both ends and zero is one of its values.
    """
    flat = x.flatten()
    sample = flat[:: -(-flat.numel() // MAX_VALUES)]
    ordered = sample.sort().values
    ordered[0], ordered[-1] = flat.amin(), flat.amax()
    found: list[UniformGrid] = []
    for share in shares:
        bottom, top = _range(ordered, share)
        found.append(between(bottom, top, bits))
        if low is not None:
            found.append(between(torch.full_like(top, low), top, bits, exact_zero=False))
    return min(found, key=lambda grid: float(squared_error(sample, grid)))


def search_pattern(
    p: Float[Tensor, "*dims"], bits: int, *, shares: Sequence[float] = SHARES
) -> LogarithmicGrid | UniformGrid:
    """A grid for softmax's outputs: log2 or log-sqrt-2, from the largest value or from 1, or a uniform one.

    The steps of a logarithmic grid do not become finer with more bits: from about six on, the uniform one wins.
    """
    check_bits(bits)
    flat = p.flatten()
    sample = flat[:: -(-flat.numel() // MAX_VALUES)]
    grids: list[LogarithmicGrid | UniformGrid] = [
        LogarithmicGrid(bits=bits, scale=scale, steps_per_octave=steps)
        for steps in STEPS_PER_OCTAVE
        for scale in (float(flat.amax()), 1.0)
    ]
    grids.append(search_tensor(p, bits, shares=shares))
    return min(grids, key=lambda grid: float(squared_error(sample, grid)))


def squared_error(x: Float[Tensor, "*dims"], grid: ActivationGrid) -> Float[Tensor, ""]:
    """Mean squared error of quantizing, float64."""
    error: Tensor = (grid.values(grid.codes(x)) - x).double().square().mean()
    return error


def _channel_errors(x: Float[Tensor, "tokens channels"], grid: UniformGrid) -> Float[Tensor, "values=channels"]:
    return (grid.values(grid.codes(x)) - x).double().square().mean(0)


def _grid(ordered: Float[Tensor, "tokens channels"], bits: int, share: float) -> UniformGrid:
    return between(*_range(ordered, share), bits)


def _range(ordered: Tensor, share: float) -> tuple[Tensor, Tensor]:
    last = len(ordered) - 1
    top = round(share * last)
    return ordered[last - top], ordered[top]
