"""Uniform grids: the quantized weight as the checkpoint stores it.

A weight is ``scale * code`` with a signed integer code of ``bits`` bits and one scale for each group of columns of a
row, a bfloat16 or a float8 number. The scales are fixed before any column is rounded (static groups in the original
column layout), so that no ``g_idx`` is stored and no scale depends on the order of the work.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrpq.errors import QuantizationError
from lrpq.model.layers import Choice
from lrpq.quant import trellis
from lrpq.quant.stored_scales import storable

if TYPE_CHECKING:
    from jaxtyping import BFloat16, Float, Int8

BITS = (2, 3, 4, 5, 6, 7, 8)
"""Widths of a code that a format stores."""
_DECODED_ELEMENTS = 2**26
"""Of a trellis, at once."""


class Grid(Enum):
    """Where the representable values of a group lie."""

    SYMMETRIC = "symmetric"
    """scale * code, scale > 0, code in [-2^(b-1), 2^(b-1) - 1]: what every serving kernel reads."""
    SIGNED = "signed"
    """The same bytes, but scales of either sign: the extra negative code serves the side that needs it."""
    ASYMMETRIC = "asymmetric"
    """scale * (code - zero point). For study: transformers does not load it (shape of the zero points)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """Codes and scales of one linear layer, in the original order of columns."""

    codes: Int8[Tensor, "d_out d_in"]
    """Signed, in [-2^(bits-1), 2^(bits-1) - 1]: steps of a uniform grid, or symbols of a trellis (quant/trellis.py)."""
    scales: BFloat16[Tensor, "d_out groups"]
    """Value of one code step; ``groups`` is ``choice.groups(d_in)``. Where they are stored as float8, these are float8
    numbers, which bfloat16 holds exactly."""
    choice: Choice
    zero_points: Int8[Tensor, "d_out groups"] | None = None
    """Code that stands for zero (asymmetric grids only)."""

    def dequantize(self, dtype: torch.dtype = torch.float32, *, name: str = "layer") -> Float[Tensor, "d_out d_in"]:
        """Scale times code, both in ``dtype``: what compressed-tensors computes on loading. Of a trellis: scale times
        the value of the state, multiplied in float32.

        In float32 and bfloat16 a grid without zero points is always finite. Float16 ends at 65,504 and the lowest
        code may lie a few times as far out as the group's largest weight; scales lose digits below 2^-17 and vanish
        at 2^-25.

        Raises QuantizationError naming the layer where a value overflows float16.
        """
        d_out, d_in = self.codes.shape
        if self.choice.trellis:
            values = self._of_trellis(dtype)
        else:
            scales = self.scales.to(dtype).unsqueeze(-1)
            values = self.units(dtype).view(d_out, len(self.scales[0]), -1).mul_(scales).view(d_out, d_in)
        if dtype is torch.float16 and not bool(torch.isfinite(values).all()):
            raise QuantizationError(
                f"{name}: scale times code is beyond float16's largest number, 65,504; use bfloat16 or float32"
            )
        return values

    def units(self, dtype: torch.dtype = torch.float32, rows: slice = slice(None)) -> Float[Tensor, "rows d_in"]:
        """Values of some rows in units of their scales, in new memory."""
        if self.choice.trellis:
            return trellis.values(self.codes, self.choice.bits, rows).to(dtype)
        codes = self.codes[rows].to(dtype)  # int8 is exact in bfloat16
        if self.zero_points is not None:
            zeros = self.zero_points[rows].to(dtype).unsqueeze(-1)
            codes.view(len(codes), zeros.shape[1], -1).sub_(zeros)
        return codes

    def _of_trellis(self, dtype: torch.dtype) -> Tensor:
        """Some rows at a time: states and values of float32 take eight times what codes do."""
        d_out, d_in = self.codes.shape
        values = torch.empty(d_out, d_in, dtype=dtype, device=self.codes.device)
        for start in range(0, d_out, step := trellis.whole_segments(_DECODED_ELEMENTS // d_in)):
            rows = slice(start, start + step)
            scales = self.scales[rows].float().unsqueeze(-1)
            found = self.units(torch.float32, rows)
            values[rows] = found.view(len(found), scales.shape[1], -1).mul_(scales).view(len(found), d_in)
        return values

    def rows(self, rows: slice) -> QuantizedWeight:
        """Some of the rows, as a view; of a trellis whole segments.

        Raises:
            QuantizationError: a segment would be cut.
        """
        if self.choice.trellis:
            trellis.check_cut(rows, len(self.codes))
        zeros = None if self.zero_points is None else self.zero_points[rows]
        return QuantizedWeight(codes=self.codes[rows], scales=self.scales[rows], choice=self.choice, zero_points=zeros)

    def split(self, num_rows: Sequence[int]) -> list[QuantizedWeight]:
        """Parts of consecutive rows, for layers that were stacked because they share an input (q, k, v); streams of a
        trellis must have been found for these parts."""
        zeros = [None] * len(num_rows) if self.zero_points is None else self.zero_points.split(list(num_rows))
        parts = zip(self.codes.split(list(num_rows)), self.scales.split(list(num_rows)), zeros, strict=True)
        return [QuantizedWeight(codes=q, scales=s, choice=self.choice, zero_points=z) for q, s, z in parts]


def code_range(bits: int) -> tuple[int, int]:
    """Smallest and largest signed code. Raises QuantizationError where no format stores the width."""
    if bits not in BITS:
        raise QuantizationError(f"{bits} bits cannot be stored: choose one of {list(BITS)}")
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def group_width(choice: Choice, d_in: int, *, name: str = "layer") -> int:
    """Columns that share a scale. Raises QuantizationError if they do not divide the width."""
    if not choice.fits(d_in) or choice.group_size == 0:
        valid = [g for g in (16, 32, 64, 128, 256) if d_in % g == 0]
        raise QuantizationError(
            f"{name}: group size {choice.group_size} does not divide its {d_in} inputs; choose one of {valid} or -1"
        )
    return d_in if choice.group_size == -1 else choice.group_size


def zero_points(W: Float[Tensor, "d_out d_in"], choice: Choice) -> Int8[Tensor, "d_out groups"]:
    """Signed code that stands for zero on the asymmetric grid: set by the group's range alone."""
    d_out, d_in = W.shape
    lowest, steps = asymmetric_range(W.reshape(d_out, d_in // group_width(choice, d_in), -1), choice.bits, dim=-1)
    return asymmetric_zero(lowest, steps, choice.bits).squeeze(-1).to(torch.int8)


@lru_cache(maxsize=256)
def code_ranges(bits: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Float[Tensor, "choices two"]:
    """``code_range`` of several widths, to compute with, not to be changed; kept, as copying it there would wait."""
    return torch.tensor([code_range(b) for b in bits], dtype=dtype, device=device)


def absmax_scales(W: Float[Tensor, "d_out d_in"], choice: Choice) -> BFloat16[Tensor, "d_out groups"]:
    """Scales 2 max|w| / (2^bits - 1), as compressed-tensors sets them by default, as stored; 1 for a group of zeros."""
    d_out, d_in = W.shape
    largest = W.reshape(d_out, d_in // group_width(choice, d_in), -1).abs().amax(-1).float()
    scales = storable(largest / (2 ** (choice.bits - 1) - 0.5), choice.bits, choice.scale_bits)
    return torch.where(largest == 0, 1.0, scales).bfloat16()


def power_of_two(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Largest power of two that is not above x > 0; 1 where x is 0.

    Dividing by it moves exponents alone: digits stay as they are and squares stay in range.
    """
    # a quotient that is a power of two is exact on every device; ldexp goes through pow, which need not be
    return torch.where(x == 0, 1.0, x / (2 * torch.frexp(x).mantissa))


def check_finite(tensor: Tensor, what: str, *, name: str) -> None:
    """Raise QuantizationError naming the layer if a value is NaN or infinite."""
    # what is not finite stays so in a sum; fp64, for sums that merely overflow fp32, takes five times as long
    if not bool(torch.isfinite(tensor.sum())) and not bool(torch.isfinite(tensor.sum(dtype=torch.float64))):
        refuse_unless_finite(math.nan, what, name=name)


def fetch(*numbers: Float[Tensor, ""]) -> list[float]:
    """Numbers of a device, exact, with one wait for it: each question of its own would leave a GPU without work."""
    kinds = list(dict.fromkeys(number.dtype for number in numbers))
    stacked = [torch.stack([number for number in numbers if number.dtype == kind]).double() for kind in kinds]
    found = iter(torch.cat(stacked).tolist())
    by_kind = {kind: iter([next(found) for number in numbers if number.dtype == kind]) for kind in kinds}
    return [next(by_kind[number.dtype]) for number in numbers]


def ends(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """Lowest and highest value of each, NaN where it holds one: what ``largest`` makes a magnitude of."""
    for tensor in tensors:
        yield from tensor.aminmax()


def largest(fetched: Sequence[float]) -> list[float]:
    """Largest magnitudes from ``ends``, once they are fetched."""
    return [max(-low, high) for low, high in zip(fetched[::2], fetched[1::2], strict=True)]


def refuse_unless_finite(magnitude: float, what: str, *, name: str) -> None:
    """``check_finite`` for a tensor whose largest magnitude is known."""
    if not math.isfinite(magnitude):
        raise QuantizationError(f"{name}: its {what} is not finite; check the source model and the calibration")


def asymmetric_range(w: Tensor, bits: int, *, dim: int) -> tuple[Tensor, Tensor]:
    """Lowest value (at most 0) and the scale that spans lowest to highest (at least 0)."""
    lowest = w.amin(dim, keepdim=True).clamp_(max=0)
    highest = w.amax(dim, keepdim=True).clamp_(min=0)
    return lowest, (highest - lowest) / (2**bits - 1)


def asymmetric_zero(lowest: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Code that stands for zero where ``lowest`` is the lowest code; a float, to compute with."""
    bottom, top = code_range(bits)
    steps_below_zero = torch.where(scale == 0, 0.0, -lowest / scale)
    return (bottom + torch.round(steps_below_zero)).clamp_(bottom, top)
