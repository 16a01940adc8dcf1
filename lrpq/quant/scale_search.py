"""The search for the scales of a grid: for each group the one of least weighted error.

Floor: every scale that is tried reads each weight once; there is no matmul in it. Some 6 operations a weight and scale
tried: on CPUs in a compiled loop (lrpq/kernels), on CUDA devices in one kernel, else (float64, zero points) as vector
operations on parts of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from lrpq.kernels.scale_errors import write_errors, write_fit
from lrpq.kernels.threads import usable
from lrpq.model.layers import Choice
from lrpq.quant.grid import (
    Grid,
    asymmetric_range,
    asymmetric_zero,
    check_finite,
    code_range,
    group_width,
    power_of_two,
)
from lrpq.quant.stored_scales import nearest, storable

if TYPE_CHECKING:
    from jaxtyping import BFloat16, Float

# Elements that see one vector operation: two temporaries of them and the weights stay in a core's cache (swept 2^15 ..
# 2^17 on one core: 2^15 is a third slower, 2^17 equal). A GPU wants launches as large as memory allows.
_CPU_PART = 2**16
_GPU_PART = 2**24
# Elements searched at once: more, so that what is small (one number a group and scale tried) is not all dispatch (swept
# 2^17 .. 2^20: 84, 77, 74, 67 ns a weight for six widths, beside other work).
_CPU_CHUNK = 2**20


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
# Float8 has 8 numbers an octave: at 3 bits as many steps as it has numbers find what trying all of them finds (within
# 0.2%; 1.5% with the steps above; Gaussian weights, groups of 32 and 64). Other widths are within 0.5% as they are.
_SEARCH_FLOAT8 = _SEARCH | {3: _Search(low=0.7, high=2.0, steps=13, refits=1)}


def search_scales(
    W: Float[Tensor, "d_out d_in"],
    importance: Float[Tensor, "columns=d_in"],
    choice: Choice,
    *,
    grid: Grid = Grid.SYMMETRIC,
    name: str = "layer",
) -> BFloat16[Tensor, "d_out groups"]:
    """Scale of every group that minimises sum_j importance_j (w_j - q_j)^2 over a bounded search.

    ``importance`` is diag(H). Every error is that of the scale as stored (bfloat16, or float8). The result is never
    worse than the absmax scale. A group of zeros gets scale 1.

    The search: absmax / d with d geometric around 2^(bits-1), then refits in which codes and least-squares
    scale alternate (constants and the sweep that chose them: ``_SEARCH``). Of equal errors the scale tried first wins.
    Targets are weights times the reciprocal of a scale; where that differs from the quotient, the weight lies halfway
    between two codes within fp32. It runs in units of a power of two
    near the group's largest weight, which changes no digit: squares of weights beyond 1e19 or below 1e-19 would
    leave float32's range, and every scale would look as good as the first.

    Raises QuantizationError if the group size does not divide d_in, or for a weight or importance that is not
    finite.
    """
    check_finite(W, "weight", name=name)
    check_finite(importance, "importance", name=name)
    return search_scales_transposed(W.T, importance, [choice], grid=grid, name=name)[0]


def search_scales_transposed(
    Wt: Float[Tensor, "d_in d_out"],
    importance: Float[Tensor, "columns=d_in"],
    choices: Sequence[Choice],
    *,
    grid: Grid = Grid.SYMMETRIC,
    name: str = "layer",
) -> list[BFloat16[Tensor, "d_out groups"]]:
    """``search_scales`` for several choices, on the transposed weight, where a group is whole rows.

    One transposition then serves all choices and the column loop, and choices of one group size share what does not
    depend on the width. Inputs are not checked for NaN. Computes in fp64 where the weight is that, else in fp32.
    """
    widths = [group_width(choice, len(Wt), name=name) for choice in choices]
    found: list[Tensor] = [Wt] * len(choices)
    kinds = [(width, choice.scale_bits) for width, choice in zip(widths, choices, strict=True)]
    for kind in dict.fromkeys(kinds):
        positions = [i for i, each in enumerate(kinds) if each == kind]
        searched = _search_groups(Wt, importance, *kind, [choices[i].bits for i in positions], grid)
        for i, scales in zip(positions, searched, strict=True):
            found[i] = scales.T.contiguous()
    return found


def _search_groups(
    Wt: Tensor, importance: Tensor, width: int, scale_bits: int, bits: Sequence[int], grid: Grid
) -> Tensor:
    """Scales [widths of the code, groups, d_out] for groups of ``width`` columns, stored in ``scale_bits``."""
    d_in, d_out = Wt.shape
    W = Wt.view(d_in // width, width, d_out)
    dtype = torch.float64 if W.dtype == torch.float64 else torch.float32
    weights = importance.to(W.device, dtype).view(d_in // width, 1, width)
    if W.is_cuda and grid is not Grid.ASYMMETRIC and usable(weights):
        return _search_on_gpu(W, weights, tuple(bits), grid, scale_bits)
    scales = torch.empty(len(bits), d_in // width, d_out, dtype=torch.bfloat16, device=W.device)
    part, chunk = (_CPU_PART, _CPU_CHUNK) if W.device.type == "cpu" else (_GPU_PART, _GPU_PART)
    # memory for the weights of a chunk and the temporaries of a part: fresh pages would cost as much as the arithmetic
    sizes = [max(W[cut].numel() for cut in _cuts(W.shape, limit)) for limit in (chunk, part, part)]
    buffers = [torch.empty(size, dtype=dtype, device=W.device) for size in sizes]
    for cut in _cuts(W.shape, chunk):
        groups, _, rows = cut
        w = buffers[0][: W[cut].numel()].view(W[cut].shape).copy_(W[cut])
        unit = power_of_two(_absmax(w))
        w.div_(unit)
        for i, b in enumerate(bits):
            best = _search_chunk(w, weights[groups], b, grid, unit, scale_bits, part=part, buffers=buffers[1:])
            scales[i, groups, rows] = storable(best * unit, b, scale_bits).squeeze(1)
    return scales


def _search_on_gpu(W: Tensor, weights: Tensor, bits: tuple[int, ...], grid: Grid, scale_bits: int) -> Tensor:
    """``_search_groups`` by the kernel; in memory rows come before groups, as results have them."""
    from lrpq.kernels import scale_search_cuda

    groups, width, d_out = W.shape
    scales = torch.empty(len(bits), d_out, groups, dtype=torch.bfloat16, device=W.device).transpose(1, 2)
    table = _table(bits, width, scale_bits, grid, W.device)
    scale_search_cuda.search_scales(W, weights.squeeze(1).contiguous(), table, scales, scale_bits=scale_bits)
    return scales


@lru_cache(maxsize=64)
def _table(bits: tuple[int, ...], width: int, scale_bits: int, grid: Grid, device: torch.device) -> Tensor:
    """What `lrpq.kernels.scale_search_cuda` tries for each width of the code; kept, as copying it there would wait."""
    lines = []
    for b in bits:
        bottom, top = code_range(b)
        both = grid is Grid.SIGNED and b <= 3
        found = divisors(b, width, scale_bits)
        tried = [-bottom - 0.5, *(sign * d for sign in ((1, -1) if both else (1,)) for d in found)]
        one_sided = grid is Grid.SIGNED and not both
        lines.append([bottom, top, len(tried), refits(b, scale_bits), float(one_sided), *tried])
    longest = max(map(len, lines))
    return torch.tensor([[*line, *[1.0] * (longest - len(line))] for line in lines], dtype=torch.float32, device=device)


Cut = tuple[slice, slice, slice]


def _cuts(shape: Sequence[int], limit: int) -> list[Cut]:
    """Ranges of groups and of rows, of about ``limit`` elements; every (group, row) is searched by itself."""
    num_groups, width, d_out = shape
    # more than 128 rows keep the inner loops long even for the widest groups
    num_rows = min(d_out, max(128, limit // width))
    groups_at_once = max(1, round(limit / (width * num_rows)))
    return [
        (slice(g, g + groups_at_once), slice(None), slice(r, r + num_rows))
        for g in range(0, num_groups, groups_at_once)
        for r in range(0, d_out, num_rows)
    ]


def _search_chunk(
    w: Tensor,
    importance: Tensor,
    bits: int,
    grid: Grid,
    unit: Tensor,
    scale_bits: int,
    *,
    part: int,
    buffers: Sequence[Tensor],
) -> Tensor:
    """Best scales [groups, 1, rows] of w [groups, width, rows] under importance [groups, 1, width], all in ``unit``.

    The largest weight of a group lies in 1 .. 2, so no scale is near the ends of bfloat16; where the narrow range of
    float8 ends depends on the unit. ``buffers`` are two of the size of a part.
    """
    bottom, _ = code_range(bits)
    base = _absmax(w)
    zero = None
    if grid is Grid.ASYMMETRIC:
        lowest, base = asymmetric_range(w, bits, dim=1)
        zero, base = asymmetric_zero(lowest, base, bits), base * (-bottom - 0.5)
    # a group of zeros is rounded exactly by any scale: the first one tried, which is then 1
    base = torch.where(base == 0, -bottom - 0.5, base)
    by = base.new_tensor(divisors(bits, w.shape[1], scale_bits)).view(-1, 1, 1, 1)
    tried = [(base / (-bottom - 0.5)).unsqueeze(0), *(signed / by for signed in _signed(base, w, bits, grid))]
    scales = _as_stored(torch.cat(tried), unit, scale_bits)

    rounded = _on(w, importance, zero, bits, part=part, buffers=buffers)
    errors = rounded.errors(scales.reciprocal()).mul_(scales).mul_(scales)
    # of equal errors min takes the first, on any device (argmin does too, at ten times the time)
    best = scales.gather(0, errors.min(0, keepdim=True).indices).squeeze(0)

    for _ in range(refits(bits, scale_bits)):
        product, squares = rounded.fit(best.reciprocal())
        refitted = _as_stored(product / squares, unit, scale_bits)
        # with these codes the error is a parabola in the scale; what it gains, rounding again can only add to. False
        # for NaN, of a group whose codes are all zero
        gains = (refitted - best) * ((refitted + best) * squares - 2 * product) < 0
        torch.where(gains, refitted, best, out=best)
    return best


def _as_stored(s: Tensor, unit: Tensor, scale_bits: int) -> Tensor:
    """Scales in units of a power of two, as they are stored."""
    return s.bfloat16().to(s.dtype) if scale_bits == 16 else nearest(s * unit, scale_bits) / unit


class _Rounded(Protocol):
    """A chunk's weights on grids of given scales."""

    def errors(self, inverses: Tensor) -> Tensor:
        """Weighted squared errors, in units of the scale squared, for every 1 / scale [tried, groups, 1, rows]."""

    def fit(self, inverse: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted sums of weight times code and of squared codes [groups, 1, rows], at one 1 / scale."""


def _on(
    w: Tensor, importance: Tensor, zero: Tensor | None, bits: int, *, part: int, buffers: Sequence[Tensor]
) -> _Rounded:
    if zero is None and usable(w) and not w.is_cuda:
        return _Compiled(w, importance, code_range(bits))
    return _Parts(w, importance, zero, bits, part, buffers)


@dataclass(frozen=True, slots=True)
class _Compiled:
    """By compiled loops."""

    w: Tensor
    importance: Tensor
    range: tuple[int, int]

    def errors(self, inverses: Tensor) -> Tensor:
        errors = torch.empty_like(inverses)
        write_errors(self.w, self.importance, inverses, errors, self.range)
        return errors

    def fit(self, inverse: Tensor) -> tuple[Tensor, Tensor]:
        product, squares = torch.empty_like(inverse), torch.empty_like(inverse)
        write_fit(self.w, self.importance, inverse, product, squares, self.range)
        return product, squares


class _Parts:
    """By vector operations, on parts of the chunk."""

    def __init__(
        self, w: Tensor, importance: Tensor, zero: Tensor | None, bits: int, part: int, buffers: Sequence[Tensor]
    ) -> None:
        self.cuts = _cuts(w.shape, part)
        self.parts = [
            _Part(w[cut], importance[cut[0]], None if zero is None else zero[cut], bits, buffers) for cut in self.cuts
        ]

    def errors(self, inverses: Tensor) -> Tensor:
        errors = torch.empty_like(inverses)
        for cut, each in zip(self.cuts, self.parts, strict=True):
            each.write_errors(inverses[:, *cut], errors[:, *cut])
        return errors

    def fit(self, inverse: Tensor) -> tuple[Tensor, Tensor]:
        product, squares = torch.empty_like(inverse), torch.empty_like(inverse)
        for cut, each in zip(self.cuts, self.parts, strict=True):
            each.write_fit(inverse[cut], product[cut], squares[cut])
        return product, squares


class _Part:
    """Some groups and rows of a chunk, so few that all work on them stays in cache."""

    def __init__(
        self, w: Tensor, importance: Tensor, zero: Tensor | None, bits: int, buffers: Sequence[Tensor]
    ) -> None:
        self.w, self.importance, self.zero = w, importance, zero
        self.range = code_range(bits)
        self.t, self.q = (b[: w.numel()].view(w.shape) for b in buffers)

    def write_errors(self, inverses: Tensor, errors: Tensor) -> None:
        """Weighted squared error, in units of its scale squared, for every 1 / scale [tried, groups, 1, rows]."""
        for inverse, error in zip(inverses.unbind(), errors.unbind(), strict=True):
            self._round(inverse)
            torch.bmm(self.importance, self.t.sub_(self.q).square_(), out=error)

    def write_fit(self, inverse: Tensor, product: Tensor, squares: Tensor) -> None:
        """Weighted sums of weight times code and of squared codes, at one 1 / scale."""
        self._round(inverse)
        if self.zero is not None:
            self.q.sub_(self.zero)
        torch.bmm(self.importance, torch.mul(self.w, self.q, out=self.t), out=product)
        torch.bmm(self.importance, self.q.square_(), out=squares)

    def _round(self, inverse: Tensor) -> None:
        """Targets in t, codes in q."""
        torch.mul(self.w, inverse, out=self.t)
        if self.zero is not None:
            self.t.add_(self.zero)
        torch.round(self.t, out=self.q).clamp_(*self.range)


def _absmax(w: Tensor) -> Tensor:
    return torch.maximum(w.amax(1, keepdim=True), -w.amin(1, keepdim=True))


def _searched(bits: int, scale_bits: int) -> _Search:
    return (_SEARCH_FLOAT8 if scale_bits == 8 else _SEARCH)[bits]


def refits(bits: int, scale_bits: int = 16) -> int:
    """How often codes and least-squares scale alternate behind the scales tried."""
    return _searched(bits, scale_bits).refits


def divisors(bits: int, width: int, scale_bits: int = 16) -> list[float]:
    """What the absmax of a group of so many columns is divided by to try scales; geometric: dense where these are
    small."""
    search = _searched(bits, scale_bits)
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
