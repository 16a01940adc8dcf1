"""Ranges by error search: how far the outliers of an activation are clipped.

Candidates are ranges between quantiles. LRP-QViT (Ranjan & Savakis 2024) searches the shares .999, .9999 and .99999 a
channel by the mean squared error of the activation, as RepQ-ViT does. Calibrated on few images these quantiles are next
to the extremes. Tighter ones have a far lower squared error at four bits, and yet the model is worse with them than
without any clipping: what the next product makes of the errors, and for which tokens, does not show in the activation.
So candidates, tighter ones and none at all among them, are judged by the error of the next product, each token with its
squared gradient (`judging`); that is ours. The squared error of the activation is kept for comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from lrpq.activations.grids import ActivationGrid, LogarithmicGrid, UniformGrid, around_zero, between, check_bits

if TYPE_CHECKING:
    from jaxtyping import Float

SHARES = (1.0, 0.99999, 0.9999, 0.999, 0.998, 0.995, 0.99, 0.98, 0.96)
"""Of the values within the range at either end, widest first; 1 clips nothing."""
UNCLIPPED = (1.0,)
MAX_VALUES = 1 << 20
"""Of one tensor that quantiles are taken from, evenly strided; its extremes are those of all values."""
STEPS_PER_OCTAVE = (1, 2)
AnyGrid = TypeVar("AnyGrid", bound=ActivationGrid)
Error = Callable[[ActivationGrid], float]
"""What a grid costs."""


def best(candidates: Iterator[AnyGrid], error: Error) -> AnyGrid:
    """The candidate of least error; the first of equals."""
    return min(candidates, key=error)


def squared_error(x: Float[Tensor, "*dims"]) -> Error:
    """Mean squared error of the quantized activation; of large tensors, of evenly strided values."""
    flat = x if x.ndim == 2 else x.flatten()
    step = -(-x.numel() // MAX_VALUES)
    sample = flat[::step]
    return lambda grid: float((grid.values(grid.codes(sample)) - sample).double().square().mean())


def tensor_candidates(
    x: Float[Tensor, "*dims"], bits: int, *, shares: Sequence[float] = SHARES, low: float | None = None
) -> Iterator[UniformGrid]:
    """One range for the tensor.

    Args:
        x: calibration activations.
        bits: of a code.
        shares: to choose from.
        low: bound below which nothing lies, as of GELU's outputs: ranges that begin there (shifted grids) compete too.
            By default a range is clipped at both ends and zero is one of its values.
    """
    flat = x.flatten()
    ordered = flat[:: -(-flat.numel() // MAX_VALUES)].sort().values
    ordered[0], ordered[-1] = flat.amin(), flat.amax()
    for share in shares:
        bottom, top = _range(ordered, share)
        yield between(bottom, top, bits)
        if low is not None:
            yield between(torch.full_like(top, low), top, bits, exact_zero=False)


def channel_candidates(
    x: Float[Tensor, "tokens channels"], bits: int, *, shares: Sequence[float] = SHARES, shared_zero: bool = False
) -> Iterator[UniformGrid]:
    """A range for each channel: one share for all channels, or for each that of its least squared error.

    With ``shared_zero`` zero has one code in all channels, which folding then does not shift (`folding`).
    """
    ordered, grid_of = x.sort(dim=0).values, around_zero if shared_zero else between
    grids = [grid_of(*_range(ordered, share), bits) for share in shares]
    yield from grids
    if len(grids) == 1:
        return
    errors = torch.stack([(grid.values(grid.codes(x)) - x).double().square().mean(0) for grid in grids])
    each, channels = errors.argmin(0), torch.arange(x.shape[1], device=x.device)
    yield UniformGrid(
        bits=bits,
        scale=torch.stack([grid.scale for grid in grids])[each, channels],
        offset=torch.stack([grid.offset for grid in grids])[each, channels],
    )


def pattern_candidates(
    p: Float[Tensor, "*dims"], bits: int, *, shares: Sequence[float] = SHARES
) -> Iterator[LogarithmicGrid | UniformGrid]:
    """Grids for softmax's outputs: log2 or log-sqrt-2, from the largest value or from 1, or uniform ones.

    The steps of a logarithmic grid do not become finer with more bits: from about six on, a uniform one wins.
    """
    check_bits(bits)
    for steps in STEPS_PER_OCTAVE:
        for scale in (float(p.amax()), 1.0):
            yield LogarithmicGrid(bits=bits, scale=scale, steps_per_octave=steps)
    yield from tensor_candidates(p, bits, shares=shares)


def _range(ordered: Tensor, share: float) -> tuple[Tensor, Tensor]:
    last = len(ordered) - 1
    top = round(share * last)
    return ordered[last - top], ordered[top]
