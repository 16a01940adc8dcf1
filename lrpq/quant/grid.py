"""Uniform grids: the quantized weight as the checkpoint stores it, and the search for its scales.

A weight is ``scale * code`` with a signed integer code of ``bits`` bits and one bfloat16 scale for each group
of columns of a row. The scales are fixed before any column is rounded (static groups in the original column
layout), so that no ``g_idx`` is stored and no scale depends on the order of the work.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrpq.errors import QuantizationError
from lrpq.model.layers import Choice

if TYPE_CHECKING:
    from jaxtyping import BFloat16, Float, Int8

# Elements of one temporary of the scale search. Swept 2^14 .. 2^18 on 2 cores: below 2^17 dispatch costs more
# than the cache saves (72-80 ns a weight for all six widths at 2^18, 120 at 2^16); a GPU wants launches as
# large as memory allows.
_CPU_CHUNK = 2**18
_GPU_CHUNK = 2**24


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
    """Signed, in [-2^(bits-1), 2^(bits-1) - 1]."""
    scales: BFloat16[Tensor, "d_out groups"]
    """Value of one code step; ``groups`` is ``choice.groups(d_in)``."""
    choice: Choice
    zero_points: Int8[Tensor, "d_out groups"] | None = None
    """Code that stands for zero (asymmetric grids only)."""

    def dequantize(self, dtype: torch.dtype = torch.float32, *, name: str = "layer") -> Float[Tensor, "d_out d_in"]:
        """Scale times code, both in ``dtype``: what compressed-tensors computes on loading.

        In float32 and bfloat16 a grid without zero points is always finite. Float16 ends at 65,504 and the lowest
        code may lie a few times as far out as the group's largest weight; scales lose digits below 2^-17 and vanish
        at 2^-25.

        Raises QuantizationError naming the layer where a value overflows float16.
        """
        d_out, d_in = self.codes.shape
        codes = self.codes.view(d_out, self.scales.shape[1], -1).to(dtype)  # int8 is exact in bfloat16
        if self.zero_points is not None:
            codes -= self.zero_points.to(dtype).unsqueeze(-1)
        values = codes.mul_(self.scales.to(dtype).unsqueeze(-1)).view(d_out, d_in)
        if dtype is torch.float16 and not bool(torch.isfinite(values).all()):
            raise QuantizationError(
                f"{name}: scale times code is beyond float16's largest number, 65,504; use bfloat16 or float32"
            )
        return values

    def split(self, num_rows: Sequence[int]) -> list[QuantizedWeight]:
        """Parts of consecutive rows, for layers that were stacked because they share an input (q, k, v)."""
        zeros = [None] * len(num_rows) if self.zero_points is None else self.zero_points.split(list(num_rows))
        parts = zip(self.codes.split(list(num_rows)), self.scales.split(list(num_rows)), zeros, strict=True)
        return [QuantizedWeight(codes=q, scales=s, choice=self.choice, zero_points=z) for q, s, z in parts]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Search:
    """Scales to try: absmax / d for d from ``low`` to ``high`` times 2^(bits-1), then least squares."""

    low: float
    high: float
    steps: int
    refits: int


# Sweep over Gaussian, Laplace and Student-t(4) weights, groups of 64, importance flat or log-normal with
# sigma 1.5; squared error relative to 300 steps: within 0.6% at 2, 3 and 4 bits, 1.3% at 5, 4% at 6. Without
# the refits 3 bits need 24 steps for the same. At 8 bits, 6 steps are 10-25% above 300 steps, of an error
# 1/16 of that at 6 bits.
_SEARCH = {
    2: _Search(low=0.4, high=2.2, steps=8, refits=2),
    3: _Search(low=0.7, high=2.0, steps=8, refits=2),
    4: _Search(low=0.78, high=1.7, steps=12, refits=2),
    5: _Search(low=0.8, high=1.4, steps=14, refits=2),
    6: _Search(low=0.82, high=1.2, steps=12, refits=1),
    7: _Search(low=0.84, high=1.1, steps=8, refits=1),
    8: _Search(low=0.85, high=1.02, steps=6, refits=0),
}


def code_range(bits: int) -> tuple[int, int]:
    """Smallest and largest signed code. Raises QuantizationError where no format stores the width."""
    if bits not in _SEARCH:
        raise QuantizationError(f"{bits} bits cannot be stored: choose one of {sorted(_SEARCH)}")
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def group_width(choice: Choice, d_in: int, *, name: str = "layer") -> int:
    """Columns that share a scale. Raises QuantizationError if they do not divide the width."""
    if not choice.fits(d_in) or choice.group_size == 0:
        valid = [g for g in (16, 32, 64, 128, 256) if d_in % g == 0]
        raise QuantizationError(
            f"{name}: group size {choice.group_size} does not divide its {d_in} inputs; choose one of {valid} or -1"
        )
    return d_in if choice.group_size == -1 else choice.group_size


def search_scales(
    W: Float[Tensor, "d_out d_in"],
    importance: Float[Tensor, "columns=d_in"],
    choice: Choice,
    *,
    grid: Grid = Grid.SYMMETRIC,
    name: str = "layer",
) -> BFloat16[Tensor, "d_out groups"]:
    """Scale of every group that minimises sum_j importance_j (w_j - q_j)^2 over a bounded search.

    ``importance`` is diag(H). Every error is that of the scale as stored (bfloat16). The result is never
    worse than the absmax scale. A group of zeros gets scale 1.

    The search: absmax / d with d geometric around 2^(bits-1), then refits in which codes and least-squares
    scale alternate (constants and the sweep that chose them: ``_SEARCH``). It runs in units of a power of two
    near the group's largest weight, which changes no digit: squares of weights beyond 1e19 or below 1e-19 would
    leave float32's range, and every scale would look as good as the first.

    Raises QuantizationError if the group size does not divide d_in, or for a weight or importance that is not
    finite.
    """
    check_finite(W, "weight", name=name)
    check_finite(importance, "importance", name=name)
    dtype = torch.float64 if W.dtype == torch.float64 else torch.float32
    return search_scales_transposed(W.to(dtype).T.contiguous(), importance, choice, grid=grid, name=name)


def search_scales_transposed(
    Wt: Float[Tensor, "d_in d_out"],
    importance: Float[Tensor, "columns=d_in"],
    choice: Choice,
    *,
    grid: Grid = Grid.SYMMETRIC,
    name: str = "layer",
) -> BFloat16[Tensor, "d_out groups"]:
    """``search_scales`` on the transposed weight (contiguous, fp32 or fp64), where a group is whole rows.

    One transposition then serves all choices and the column loop. Inputs are not checked for NaN.
    """
    d_in, d_out = Wt.shape
    width = group_width(choice, d_in, name=name)
    W = Wt.view(d_in // width, width, d_out)
    weights = importance.to(Wt).view(d_in // width, 1, width)
    scales = torch.empty(d_in // width, d_out, dtype=torch.bfloat16, device=Wt.device)
    for groups, rows in _chunks(W):
        scales[groups, rows] = _search_chunk(W[groups, :, rows], weights[groups], choice.bits, grid).squeeze(1)
    return scales.T.contiguous()


def zero_points(W: Float[Tensor, "d_out d_in"], choice: Choice) -> Int8[Tensor, "d_out groups"]:
    """Signed code that stands for zero on the asymmetric grid: set by the group's range alone."""
    d_out, d_in = W.shape
    lowest, steps = _asymmetric_range(W.reshape(d_out, d_in // group_width(choice, d_in), -1), choice.bits, dim=-1)
    return _asymmetric_zero(lowest, steps, choice.bits).squeeze(-1).to(torch.int8)


def absmax_scales(W: Float[Tensor, "d_out d_in"], choice: Choice) -> BFloat16[Tensor, "d_out groups"]:
    """Scales 2 max|w| / (2^bits - 1), as compressed-tensors sets them by default; 1 for a group of zeros."""
    d_out, d_in = W.shape
    largest = W.reshape(d_out, d_in // group_width(choice, d_in), -1).abs().amax(-1).float()
    scales = _storable(largest / (2 ** (choice.bits - 1) - 0.5), choice.bits)
    return torch.where(largest == 0, 1.0, scales).bfloat16()


def power_of_two(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Largest power of two that is not above x > 0; 1 where x is 0.

    Dividing by it moves exponents alone: digits stay as they are and squares stay in range.
    """
    # a quotient that is a power of two is exact on every device; ldexp goes through pow, which need not be
    return torch.where(x == 0, 1.0, x / (2 * torch.frexp(x).mantissa))


def check_finite(tensor: Tensor, what: str, *, name: str) -> None:
    """Raise QuantizationError naming the layer if a value is NaN or infinite."""
    if not bool(torch.isfinite(tensor.sum(dtype=torch.float64))):  # a sum of finite fp32 cannot overflow fp64
        raise QuantizationError(f"{name}: its {what} is not finite; check the source model and the calibration")


def _chunks(W: Tensor) -> Iterator[tuple[slice, slice]]:
    """Ranges of groups and of rows that bound the temporaries; every (group, row) is searched by itself."""
    num_groups, width, d_out = W.shape
    limit = _CPU_CHUNK if W.device.type == "cpu" else _GPU_CHUNK
    # more than 256 rows keep the inner loops long even for the widest groups
    num_rows = min(d_out, max(256, limit // width))
    groups_at_once = max(1, limit // (width * num_rows))
    for g in range(0, num_groups, groups_at_once):
        for r in range(0, d_out, num_rows):
            yield slice(g, g + groups_at_once), slice(r, r + num_rows)


def _search_chunk(w: Tensor, importance: Tensor, bits: int, grid: Grid) -> Tensor:
    """Best scales [groups, 1, rows] of w [groups, width, rows] under importance [groups, 1, width]."""
    bottom, top = code_range(bits)
    base = _absmax(w)
    unit = power_of_two(base)
    w, base = w / unit, base / unit
    t, q = torch.empty_like(w), torch.empty_like(w)
    zero = None
    if grid is Grid.ASYMMETRIC:
        lowest, base = _asymmetric_range(w, bits, dim=1)
        zero, base = _asymmetric_zero(lowest, base, bits), base * (-bottom - 0.5)
    # a group of zeros is rounded exactly by any scale: the first one tried, which is then 1
    base = torch.where(base == 0, -bottom - 0.5, base)

    def error(s: Tensor) -> Tensor:
        """Weighted squared error with scales s; leaves the codes in q."""
        torch.div(w, s, out=t)
        if zero is not None:
            t.add_(zero)
        torch.round(t, out=q)
        q.clamp_(bottom, top)
        t.sub_(q).square_()
        return torch.bmm(importance, t).mul_(s).mul_(s)

    best = _to_bfloat16(base / (-bottom - 0.5))
    least = error(best)

    def keep_better(s: Tensor) -> None:
        e = error(s)
        better = e < least  # strict, and false for NaN: ties go to the scale tried first, on any device
        torch.where(better, e, least, out=least)
        torch.where(better, s, best, out=best)

    for signed_base in _signed(base, w, bits, grid):
        for d in _divisors(bits, w.shape[1]):
            keep_better(_to_bfloat16(signed_base / d))
    if _SEARCH[bits].refits:
        error(best)
    for _ in range(_SEARCH[bits].refits):
        if zero is not None:
            q.sub_(zero)
        product = torch.bmm(importance, torch.mul(w, q, out=t))
        keep_better(_to_bfloat16(product / torch.bmm(importance, q.square_())))
    return _storable(best * unit, bits)


def _divisors(bits: int, width: int) -> list[float]:
    """Divisors d of the absmax, geometric: dense where scales are small."""
    search = _SEARCH[bits]
    # the largest of many weights lies further out, so wide groups need smaller scales
    reach = max(1.0, math.log2(width / 64)) if width > 64 else 1.0
    low, high = search.low * 2 ** (bits - 1), search.high * reach * 2 ** (bits - 1)
    steps = round(search.steps * math.log(high / low) / math.log(search.high / search.low))
    return [low * (high / low) ** (i / (steps - 1)) for i in range(steps)]


def _signed(base: Tensor, w: Tensor, bits: int, grid: Grid) -> list[Tensor]:
    """The bases to divide: both signs at 2 and 3 bits; above, that which gives the extremum the extra code.

    Trying both at 4 bits and more lowers the error by under 2% and doubles the search.
    """
    if grid is not Grid.SIGNED:
        return [base]
    if bits <= 3:
        return [base, -base]
    return [torch.where(w.amax(1, keepdim=True) > -w.amin(1, keepdim=True), -base, base)]


def _absmax(w: Tensor) -> Tensor:
    return torch.maximum(w.amax(1, keepdim=True), -w.amin(1, keepdim=True))


def _asymmetric_range(w: Tensor, bits: int, *, dim: int) -> tuple[Tensor, Tensor]:
    """Lowest value (at most 0) and the scale that spans lowest to highest (at least 0)."""
    lowest = w.amin(dim, keepdim=True).clamp_(max=0)
    highest = w.amax(dim, keepdim=True).clamp_(min=0)
    return lowest, (highest - lowest) / (2**bits - 1)


def _asymmetric_zero(lowest: Tensor, scale: Tensor, bits: int) -> Tensor:
    bottom, top = code_range(bits)
    steps_below_zero = torch.where(scale == 0, 0.0, -lowest / scale)
    return (bottom + torch.round(steps_below_zero)).clamp_(bottom, top)


def _to_bfloat16(s: Tensor) -> Tensor:
    """Round to bfloat16, keep the dtype; what would vanish becomes the smallest normal number of its sign."""
    tiny = torch.finfo(torch.bfloat16).tiny
    rounded = s.bfloat16().to(s.dtype)
    return torch.where(rounded.abs() < tiny, torch.where(s < 0, -tiny, tiny), rounded)


def _storable(s: Tensor, bits: int) -> Tensor:
    """Round to bfloat16, keep the dtype; no magnitude so large that the lowest code times it overflows."""
    limit = torch.finfo(torch.bfloat16).max / 2 ** (bits - 1)
    return _to_bfloat16(s).clamp_(-limit, limit)
