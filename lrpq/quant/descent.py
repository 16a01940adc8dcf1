"""Coordinate descent on the codes: change one code at a time, as long as a row's error falls.

GPTQ rounds a column once, before it knows how the columns after it round. With scales held, the error of a row,

    f(Q) = (T - Q) H (T - Q)^T,

is a parabola in each single code. With D = T - Q and step s_k of column k its lowest point lies x_k = (D H)_k / (s_k
H_kk) codes away, so the best code given all others is the present one plus round(x_k), clamped. Columns are visited
from left to right, several times (QuantEase, Behdin et al. 2023, arXiv:2309.01885, and the cyclic form of CDQuant,
Nair and Suggala 2024, arXiv:2406.17542; both start from GPTQ's codes or from rounding, and CDQuant's own form picks the
best column of all instead). What is left is a minimum over every single code, not over pairs.

Deviation: it is the *displacement* x that is rounded, half to even. So a tie between staying and moving stays, every
move lowers the error, and zero points drop out. (By halves all of this is so up to their rounding.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrpq.errors import QuantizationError
from lrpq.kernels.columns import write_halves
from lrpq.kernels.descent import descend_columns
from lrpq.kernels.threads import in_one_launch, usable
from lrpq.quant.doubts import Doubts
from lrpq.quant.grid import QuantizedWeight, code_ranges, ends, group_width, largest, refuse_unless_finite
from lrpq.quant.halves import SPLIT_WHOLE, interleaved, product
from lrpq.quant.residual import has_kernel, write_residual

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int8

# Columns between two products with all of H, and columns that see vector operations only: swept 32 .. 128 and 4, 8 on
# one core, within 10% of each other.
BLOCK_COLUMNS = 64
_LEAF_COLUMNS = 8
# On a GPU the product with all of H is of more columns, for of 64 it is too thin to fill the card, and by halves
# (quant/halves.py) where it has more multiply-adds: some 40 microseconds in float32. Estimates, not swept.
GPU_BLOCK_COLUMNS = 512
_LEAST_WORK_BY_HALVES = 2**30
# Stacked rows at once. Swept 512 .. 4,096 on one core: more rows are faster, by 1.6 in all, as fewer calls are made.
CPU_ROWS = 4096
GPU_ELEMENTS = 2**29  # of d_in times stacked rows: 5 bytes each, 11 where products are by halves
_CONDENSE_BELOW = 0.75  # share of rows that still move below which the others are left out of the sweep


@dataclass(frozen=True, slots=True, kw_only=True)
class Descended:
    """A weight whose codes were descended, and how it went."""

    weight: QuantizedWeight
    """New codes, the scales that came in."""
    before: Int8[Tensor, "d_out d_in"]
    """The codes that came in."""
    unsettled: Bool[Tensor, "rows=d_out"]
    """Rows that still moved in the last sweep: more sweeps may lower their error further."""

    @property
    def changed_codes(self) -> int:
        """Codes that differ from those that came in."""
        return int((self.weight.codes != self.before).sum())

    @property
    def unsettled_rows(self) -> int:
        """How many rows are unsettled."""
        return int(self.unsettled.sum())


def descend(
    T: Float[Tensor, "d_out d_in"],
    quantized: Sequence[QuantizedWeight],
    H: Float[Tensor, "d_in d_in"],
    *,
    sweeps: int = 4,
    block_columns: int = BLOCK_COLUMNS,
    doubts: Doubts | None = None,
    name: str = "layer",
) -> list[Descended]:
    """Lower the error of every row under H, as it is given, by single changes of codes; several choices at once.

    T is what the codes should reproduce: the weights, or the corrected ones. Damp H before, where that is wanted: an
    undamped Hessian of few tokens fits their noise. Columns with H_kk = 0 keep their codes. Stops after ``sweeps`` or
    when nothing moves; rows that moved nothing in a sweep are done and drop out.

    Floor: a sweep multiplies all errors with H once, 2 d_in^2 FLOPs a row and choice, twice GPTQ's d_in^2 (whose
    matrix is triangular). What blocks add is their share of d_in; on a GPU they have 512 columns at least. Exact
    Gauss-Seidel whatever ``block_columns`` is: the errors of other blocks are up to date in that product, those of the
    own block in the loop over its columns (in float64 vector operations, and small products). Computes in the dtype of
    H, large layers on a GPU by its halves; each product starts from the errors, so nothing drifts. Memory besides
    inputs and results: 5 bytes times d_in times at most 4,096 rows on CPU; on a GPU 6 bytes more, and 6 bytes times
    d_in squared up to 8,192 inputs, times 512 d_in above.

    Raises QuantizationError naming the layer for shapes that do not belong together, values that are not finite or so
    large that their products could overflow, or a scale of zero; with ``doubts``, where these are settled.
    """
    d_out, d_in = T.shape
    if any(q.choice.trellis for q in quantized):
        raise QuantizationError(f"{name}: codes of a trellis are polished by streams, not one by one")
    if tuple(H.shape) != (d_in, d_in) or any(q.codes.shape != T.shape for q in quantized) or not quantized:
        shapes = [tuple(q.codes.shape) for q in quantized]
        raise QuantizationError(
            f"{name}: a target of {d_out} x {d_in}, a Hessian of {len(H)}, codes of {shapes}: they must be of one layer"
        )
    own = Doubts() if doubts is None else doubts
    _check(T, quantized, H, own, name=name)
    if doubts is None:
        own.settle()
    return descend_checked(T, quantized, H, sweeps=sweeps, block_columns=block_columns, name=name)


def descend_checked(
    T: Float[Tensor, "d_out d_in"],
    quantized: Sequence[QuantizedWeight],
    H: Float[Tensor, "d_in d_in"],
    *,
    sweeps: int,
    block_columns: int = BLOCK_COLUMNS,
    name: str = "layer",
) -> list[Descended]:
    """``descend`` of what is known to belong together, to be finite and not to overflow."""
    d_out, d_in = T.shape
    widths = [group_width(q.choice, d_in, name=name) for q in quantized]
    run = math.gcd(*widths)
    ranges = code_ranges(tuple(q.choice.bits for q in quantized), H.dtype, H.device)
    diagonal = H.diagonal()
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0.0)
    codes = torch.empty(len(quantized), d_out, d_in, dtype=torch.int8, device=T.device)
    unsettled = torch.empty(len(quantized), d_out, dtype=torch.bool, device=T.device)
    limit = CPU_ROWS if T.device.type == "cpu" else GPU_ELEMENTS // d_in
    num_rows = max(1, limit // len(quantized))
    for start in range(0, d_out, num_rows):
        rows = slice(start, start + num_rows)
        parts = [q.rows(rows) for q in quantized]
        num = len(parts[0].codes)
        state = _State(
            D=_errors(T[rows], parts, H),
            codes=torch.cat([p.codes.T for p in parts], dim=1),
            scales=torch.cat(
                [p.scales.to(H.dtype).T.repeat_interleave(w // run, 0) for p, w in zip(parts, widths, strict=True)],
                dim=1,
            ),
            ranges=ranges.repeat_interleave(num, 0).T.contiguous(),
        )
        found, moving = _descend(state, H, inverse, run, sweeps=sweeps, block=block_columns)
        codes[:, rows] = found.view(d_in, len(quantized), num).permute(1, 2, 0)
        unsettled[:, rows] = moving.view(len(quantized), num)
    return [
        Descended(
            weight=QuantizedWeight(codes=c, scales=q.scales, choice=q.choice, zero_points=q.zero_points),
            before=q.codes,
            unsettled=m,
        )
        for c, q, m in zip(codes, quantized, unsettled, strict=True)
    ]


def _errors(T: Tensor, parts: Sequence[QuantizedWeight], H: Tensor) -> Tensor:
    """T - Q of all parts, transposed and side by side."""
    if not all(has_kernel(T, p, H) for p in parts):
        return torch.cat([(T.to(H.dtype) - p.dequantize(H.dtype)).T for p in parts], dim=1).contiguous()
    D = H.new_empty(T.shape[1], len(parts) * len(T))
    for i, p in enumerate(parts):
        write_residual(T, p, D[:, i * len(T) : (i + 1) * len(T)].T)
    return D


def _check(T: Tensor, quantized: Sequence[QuantizedWeight], H: Tensor, doubts: Doubts, *, name: str) -> None:
    """Doubt that T and H are finite, that D H cannot overflow and that no scale is zero: an infinity or NaN would end
    as codes like any other."""
    choices, width, dtype = [q.choice for q in quantized], len(H), H.dtype

    def judge(found: list[float]) -> None:
        scaled, (target, hessian, *steps) = found[: len(choices)], largest(found[len(choices) :])
        refuse_unless_finite(target, "target", name=name)
        refuse_unless_finite(hessian, "Hessian", name=name)
        if not all(scaled):
            raise QuantizationError(f"{name}: a scale is zero; give a group of zeros a scale of 1")
        for step in steps:
            refuse_unless_finite(step, "grid of scales", name=name)
        error = target + max(2**choice.bits * step for choice, step in zip(choices, steps, strict=True))
        if not error * width * hessian < torch.finfo(dtype).max:
            raise QuantizationError(
                f"{name}: errors up to {error:.3g} may overflow {dtype} under its Hessian; check the source model"
            )

    doubts.ask([*(q.scales.all() for q in quantized), *ends([T, H, *(q.scales for q in quantized)])], judge)


@dataclass(frozen=True, slots=True, kw_only=True)
class _State:
    """Stacked rows of all choices, transposed so that a column is contiguous; changed in place by a sweep."""

    D: Float[Tensor, "d_in stacked"]
    """T - Q."""
    codes: Tensor
    """int8 [d_in, stacked]."""
    scales: Float[Tensor, "runs stacked"]
    """One row for each run of columns that lies in one group of every choice."""
    ranges: Float[Tensor, "two stacked"]
    """Smallest and largest code."""

    def of(self, rows: Tensor) -> _State:
        return _State(
            D=self.D[:, rows], codes=self.codes[:, rows], scales=self.scales[:, rows], ranges=self.ranges[:, rows]
        )


def _descend(state: _State, H: Tensor, inverse: Tensor, run: int, *, sweeps: int, block: int) -> tuple[Tensor, Tensor]:
    """Codes [d_in, stacked] after the sweeps, and which rows moved in the last one."""
    if usable(H) and in_one_launch(H, columns=len(H), rows=state.D.shape[1]):
        from lrpq.kernels.descent_cuda import descend_sweeps

        moved = torch.empty(state.D.shape[1], dtype=torch.bool, device=H.device)
        runs = torch.arange(len(H), device=H.device) // run
        descend_sweeps(state.D, state.codes, state.scales, state.ranges, H, inverse, runs, moved, sweeps=sweeps)
        return state.codes, moved
    codes = state.codes.clone()
    moving = torch.ones(codes.shape[1], dtype=torch.bool, device=codes.device)
    active = moving.nonzero().squeeze(1)
    split_H = interleaved(H) if _worth_halves(state, H) and len(H) <= SPLIT_WHOLE else None
    for left in range(sweeps - 1, -1, -1):
        moved = _sweep(state, H, inverse, run, block=block, split_H=split_H)
        moving[active] = moved
        num = int(moved.sum()) if left else 0
        if not num:
            break
        if num < _CONDENSE_BELOW * len(active):
            codes[:, active] = state.codes
            state, active = state.of(moved.nonzero().squeeze(1)), active[moved]
    codes[:, active] = state.codes
    return codes, moving


def _sweep(state: _State, H: Tensor, inverse: Tensor, run: int, *, block: int, split_H: Tensor | None = None) -> Tensor:
    """Visit every column once, from left to right; changes ``state``. Returns which rows moved."""
    d_in, stacked = state.D.shape
    moved = torch.zeros(stacked, dtype=torch.bool, device=H.device)
    if H.is_cuda and usable(H):
        block = max(block, GPU_BLOCK_COLUMNS)
    runs = torch.arange(d_in, device=H.device) // run
    halves = _Halves(state.D, H, split_H) if _worth_halves(state, H) else None
    G = H.new_empty(min(block, d_in) if halves is None else 0, stacked)
    visit = None if usable(H) else _Vectorized(state, H, inverse, run, moved, G)
    for start in range(0, d_in, block):
        k = slice(start, min(start + block, d_in))
        g = torch.mm(H[k], state.D, out=G[: k.stop - start]) if halves is None else halves.pulls(k)
        if visit is None:
            errors = None if halves is None else halves.errors[k]
            descend_columns(
                g, state.D[k], state.codes[k], state.scales, state.ranges, H[k, k], inverse[k], runs[k], moved, errors
            )
        else:
            visit(k)
    return moved


def _worth_halves(state: _State, H: Tensor) -> bool:
    work = GPU_BLOCK_COLUMNS * state.D.numel()
    return H.is_cuda and usable(H) and work >= _LEAST_WORK_BY_HALVES


class _Halves:
    """Products of all errors with some rows of H, by halves; the errors of columns that are visited are written there
    as well."""

    def __init__(self, D: Tensor, H: Tensor, split_H: Tensor | None) -> None:
        self.errors = torch.empty(len(D), 3, D.shape[1], dtype=torch.bfloat16, device=D.device)
        write_halves(self.errors, D)
        self._H, self._whole = H, split_H

    def pulls(self, k: slice) -> Tensor:
        """H D for some rows of H, which is symmetric."""
        H = interleaved(self._H[:, k]) if self._whole is None else self._whole[:, k]
        found: Tensor = product(H.T, self.errors.flatten(0, 1))
        return found


class _Vectorized:
    """Visits the columns of a block by vector operations."""

    def __init__(
        self,
        state: _State,
        H: Tensor,
        inverse: Tensor,
        run: int,
        moved: Tensor,
        G: Tensor,
    ) -> None:
        self.state, self.H, self.run, self.moved, self.G = state, H, run, moved, G
        # bands[i - 1][k] = H[k, k + i]: taken from the device once, not a few numbers at a time
        self.bands = [H.diagonal(i).tolist() for i in range(1, min(_LEAF_COLUMNS, len(H)))]
        self.inverse = inverse.unbind(0)
        # of one block: codes to go, the same in units of the weights, codes to go for one unit of H D, and the ends of
        # the range from where the codes are. What does not depend on the column before is computed for all at once.
        self.steps, self.change, self.reach, self.below, self.above = (torch.empty_like(G) for _ in range(5))
        self.scales = state.scales.unbind(0)
        self.columns = list(
            zip(*(x.unbind(0) for x in (G, self.steps, self.change, self.reach, self.below, self.above)), strict=True)
        )

    def __call__(self, block: slice) -> None:
        state, start, size, s = self.state, block.start, block.stop - block.start, self.scales
        bottom, top = state.ranges.unbind(0)
        largest = torch.finfo(self.H.dtype).max
        torch.sub(bottom, state.codes[block], out=self.below[:size])
        torch.sub(top, state.codes[block], out=self.above[:size])
        for k in range(size):
            torch.div(self.inverse[start + k], s[(start + k) // self.run], out=self.columns[k][3])
        self.reach[:size].clamp_(-largest, largest)  # of tiny scales and inputs: infinity times zero is no number
        own = self.H[block, block]
        for first in range(0, size, _LEAF_COLUMNS):
            last = min(first + _LEAF_COLUMNS, size)
            if first:
                self.G[first:last].addmm_(own[first:last, :first], self.change[:first], alpha=-1.0)
            for k in range(first, last):
                g, n, d, f, low, high = self.columns[k]
                torch.mul(g, f, out=n).round_()
                torch.clamp(n, low, high, out=n)
                torch.mul(n, s[(start + k) // self.run], out=d)
                for later in range(k + 1, last):
                    self.columns[later][0].sub_(d, alpha=self.bands[later - k - 1][start + k])
        state.D[block] -= self.change[:size]
        state.codes[block] = (state.codes[block] + self.steps[:size]).to(torch.int8)
        self.moved |= self.steps[:size].any(0)
