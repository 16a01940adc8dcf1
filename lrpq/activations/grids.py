"""Grids of activations: what an integer code stands for.

    uniform       x^ = s q + o, q in [0, 2^b - 1]; s and o one for the tensor, or one a channel
    logarithmic   p^ = s 2^(-q / m), the last code 0; of softmax's outputs

A uniform grid has a real offset o. Where zero must be representable (the usual integer zero point z), o = -s z. GELU's
outputs end at -0.17, and many lie just above: there the offset can be that bound itself ("shifted"), so that no code
is spent below it. An offset costs nothing: W (s q + o) = s W q + W o, and W o goes into the bias.

Logarithmic: log2 quantization with m = 1, log-sqrt-2 with m = 2 (Li et al. 2023, RepQ-ViT). That the last code is zero
is ours: most of a pattern's entries are smaller than the smallest step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from lrpq.errors import QuantizationError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

MAX_BITS = 8
_SMALLEST_STEP = 1e-8
"""Of a tensor that is constant: any step serves, and none may be zero."""


class ActivationGrid(Protocol):
    """Quantize and dequantize."""

    @property
    def bits(self) -> int:
        """Of a code."""
        ...

    def codes(self, x: Tensor) -> Tensor:
        """Integer codes in [0, 2^bits - 1], as whole numbers in the dtype of ``x``."""
        ...

    def values(self, codes: Tensor) -> Tensor:
        """What the codes stand for."""
        ...


def quantized(x: Float[Tensor, "*dims"], grid: ActivationGrid) -> Float[Tensor, "*dims"]:
    """``x`` on the grid, in its own dtype."""
    return grid.values(grid.codes(x)).to(x.dtype)


def placed(grid: ActivationGrid, device: torch.device) -> ActivationGrid:
    """The grid with its vectors on a device; scalars serve every device."""
    if not isinstance(grid, UniformGrid) or not grid.per_channel:
        return grid
    return replace(grid, scale=grid.scale.to(device), offset=grid.offset.to(device))


@dataclass(frozen=True, slots=True, kw_only=True)
class UniformGrid:
    """Evenly spaced values."""

    bits: int
    scale: Float[Tensor, "*channels"]
    """Step, positive; a scalar, or one a channel of the last axis."""
    offset: Float[Tensor, "*channels"]
    """Value of code 0."""

    def codes(self, x: Float[Tensor, "*dims"]) -> Int[Tensor, "*dims"]:
        """Nearest code; half to even."""
        q: Tensor = ((x - self.offset) / self.scale).round_().clamp_(0, 2**self.bits - 1)
        return q

    def values(self, codes: Int[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
        """s q + o."""
        x: Tensor = codes * self.scale + self.offset
        return x

    @property
    def per_channel(self) -> bool:
        """Whether every channel has a step of its own."""
        return bool(self.scale.ndim) and self.scale.numel() > 1


def between(
    low: Float[Tensor, "*channels"], high: Float[Tensor, "*channels"], bits: int, *, exact_zero: bool = True
) -> UniformGrid:
    """The grid from ``low`` to ``high``.

    Args:
        low: lowest value, or one a channel.
        high: highest value.
        bits: of a code.
        exact_zero: widen the range to hold zero and round the offset to a whole number of steps, so that zero is one of
            the values. Otherwise code 0 is ``low`` itself (shifted).

    Raises:
        QuantizationError: the width is not between 2 and 8 bits, or the range is not finite.
    """
    _check_range(low, high, bits)
    if exact_zero:
        low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=_SMALLEST_STEP)
    offset = (low / scale).round() * scale if exact_zero else low
    return UniformGrid(bits=bits, scale=scale, offset=offset)


def around_zero(low: Float[Tensor, "channels=h"], high: Float[Tensor, "channels=h"], bits: int) -> UniformGrid:
    """Grids a channel whose zero has the same code everywhere, 2^(b - 1): the narrowest that hold the ranges.

    Raises:
        QuantizationError: see `between`.
    """
    _check_range(low, high, bits)
    below = 2 ** (bits - 1)
    scale = torch.maximum(-low / below, high / (below - 1)).clamp(min=_SMALLEST_STEP)
    return UniformGrid(bits=bits, scale=scale, offset=-below * scale)


def _check_range(low: Tensor, high: Tensor, bits: int) -> None:
    check_bits(bits)
    if not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
        raise QuantizationError("activations to calibrate on are not finite; check the model's values")


@dataclass(frozen=True, slots=True, kw_only=True)
class LogarithmicGrid:
    """Values that fall by a constant factor, and zero."""

    bits: int
    scale: float
    """Largest value."""
    steps_per_octave: int
    """m: 1 is log2, 2 is log-sqrt-2."""

    def codes(self, x: Float[Tensor, "*dims"]) -> Int[Tensor, "*dims"]:
        """Nearest code on the logarithmic scale; what lies half a step below the smallest value is zero."""
        last = 2**self.bits - 1
        # log2(0) is -inf, of which clamp makes the last code
        q: Tensor = (-self.steps_per_octave * (x / self.scale).log2()).round_().clamp_(0, last)
        return q

    def values(self, codes: Int[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
        """s 2^(-q / m), 0 for the last code."""
        x = self.scale * torch.exp2(-codes / self.steps_per_octave)
        return torch.where(codes == 2**self.bits - 1, 0.0, x)


def check_bits(bits: int) -> None:
    """Raises QuantizationError for a width that no grid has."""
    if not 2 <= bits <= MAX_BITS:
        raise QuantizationError(f"activations of {bits} bits: expected 2 to {MAX_BITS}")
