"""Columns of a sweep of coordinate descent, for CUDA devices, in Triton: some of them, or sweeps of a small layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from lrpq.kernels.leaves_cuda import (
    DEPTH,
    LEAF,
    ROWS,
    half_of,
    own_rows,
    picked,
    product_with,
    store_halves,
    to_nearest,
)
from lrpq.kernels.threads import on_device_of

if TYPE_CHECKING:
    from torch import Tensor


def descend_columns(
    G: Tensor,
    D: Tensor,
    codes: Tensor,
    S: Tensor,
    bounds: Tensor,
    own: Tensor,
    inverse: Tensor,
    runs: Tensor,
    moved: Tensor,
    halves: Tensor | None = None,
) -> None:
    """See `lrpq.kernels.descent.descend_columns`; G ends as the changes of the errors."""
    num_columns, rows = D.shape
    with on_device_of(D):
        _descend_columns[(triton.cdiv(rows, ROWS),)](
            G, D, codes, S, bounds, own, inverse, runs, moved, D if halves is None else halves,
            num_columns, rows, own.stride(0), own.stride(1),
            HALVES=halves is not None, LEAF=LEAF, ROWS=ROWS, DEPTH=DEPTH, HALF=half_of(D), num_warps=1,
        )  # fmt: skip


def descend_sweeps(
    D: Tensor,
    codes: Tensor,
    S: Tensor,
    bounds: Tensor,
    H: Tensor,
    inverse: Tensor,
    runs: Tensor,
    moved: Tensor,
    *,
    sweeps: int,
) -> None:
    """All sweeps of `lrpq.quant.descent`; codes and errors are changed in place. Rows of a program stop together.

    Args:
        D: errors T - Q [columns, rows], float32, contiguous.
        codes: int8, as D.
        S: scales of the runs of columns that share one [runs, rows], contiguous.
        bounds: smallest and largest code of every row [2, rows], contiguous.
        H: [columns, columns], symmetric, any strides.
        inverse: 1 / H_kk, 0 for a dead input.
        runs: row of S for each column, int64.
        moved: written: rows of which a code changed in the last sweep.
        sweeps: at most.
    """
    num_columns, rows = D.shape
    with on_device_of(D):
        _descend_sweeps[(triton.cdiv(rows, ROWS),)](
            D.new_empty(LEAF, rows), D, codes, S, bounds, H, inverse, runs, moved,
            num_columns, rows, sweeps, H.stride(0), H.stride(1),
            LEAF=LEAF, ROWS=ROWS, DEPTH=DEPTH, HALF=half_of(D), num_warps=1,
        )  # fmt: skip


@triton.jit
def _descend_leaf(
    pulls, codes, S, inverse, runs, h, beside, low, high, first, num_columns, rows, last, row, inside, step,
    LEAF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A leaf's columns one after another: changes of the errors [ROWS, LEAF], the codes, and steps of each row."""
    column = tl.max_contiguous(tl.arange(0, LEAF), 1)
    run = tl.load(runs + last).to(tl.int32)
    s = tl.load(S + run[None, :] * rows + row[:, None], mask=inside, other=1.0)
    code = tl.load(codes + last[None, :] * rows + row[:, None], mask=inside, other=0).to(tl.float32)
    # of tiny scales and inputs: infinity times zero would be no number
    reach = tl.div_rn(tl.load(inverse + last)[None, :] + tl.zeros([ROWS, LEAF], tl.float32), s)
    reach = tl.minimum(tl.maximum(reach, -3.4028234e38), 3.4028234e38)
    reach = tl.where(inside, reach, 0.0)  # what is beyond the end stays
    below, above = low[:, None] - code, high[:, None] - code
    changes, steps = tl.zeros([ROWS, LEAF], tl.float32), tl.zeros([ROWS, LEAF], tl.float32)
    for i in tl.static_range(LEAF):
        now, later = (column == i)[None, :], (column > i)[None, :]
        n = tl.maximum(picked(pulls, now) * picked(reach, now), picked(below, now))
        n = to_nearest(tl.minimum(n, picked(above, now)))
        change = n * picked(s, now)
        changes = tl.where(now, change[:, None], changes)
        steps = tl.where(now, n[:, None], steps)
        if i > 0:
            h = tl.load(beside + tl.minimum(first + i, num_columns - 1) * step, mask=later, other=0.0)
        pulls = tl.where(later, pulls - h * change[:, None], pulls)
    return changes, code + steps, tl.sum(tl.abs(steps), axis=1)


@triton.jit
def _descend_columns(
    G, D, codes, S, bounds, own, inverse, runs, moved, halves,
    num_columns, rows, own_row, own_column,
    HALVES: tl.constexpr, LEAF: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    row, valid = own_rows(rows, ROWS)
    column = tl.max_contiguous(tl.arange(0, LEAF), 1)
    low = tl.load(bounds + row, mask=valid, other=0.0)
    high = tl.load(bounds + rows + row, mask=valid, other=0.0)
    everywhere = tl.zeros([ROWS, LEAF], tl.int32)
    steps = tl.zeros([ROWS], tl.float32)
    for first in range(0, num_columns, LEAF):
        k = first + column
        inside = (k < num_columns)[None, :] & valid[:, None]
        last = tl.minimum(k, num_columns - 1)  # beyond the end anything may be computed; it is not stored
        at = last[None, :] * rows + row[:, None]
        beside = own + last[None, :] * own_row + everywhere  # symmetric: of one line of memory all columns have some
        h = tl.load(beside + first * own_column)  # here, so that what the columns need is near when their turn comes
        d = tl.load(D + at, mask=inside, other=0.0)
        if first > 0:  # before a leaf G holds what pulls, behind it the changes
            changed = product_with(own, first, last, rows, G, rows, own_row, own_column, LEAF, ROWS, DEPTH, HALF)
            tl.store(G + at, tl.load(G + at, mask=inside, other=0.0) - changed, mask=inside)
            tl.debug_barrier()
        pulls = tl.load(G + at, mask=inside, other=0.0)
        changes, after, steps_of_leaf = _descend_leaf(
            pulls, codes, S, inverse, runs, h, beside, low, high, first, num_columns, rows, last, row, inside,
            own_column, LEAF, ROWS,
        )  # fmt: skip
        steps += steps_of_leaf
        tl.debug_barrier()  # all lanes have read what other lanes change
        tl.store(G + at, changes, mask=inside)
        tl.store(D + at, d - changes, mask=inside)
        tl.store(codes + at, after.to(tl.int8), mask=inside)
        if HALVES:
            store_halves(halves + last[None, :] * 3 * rows + row[:, None], rows, d - changes, inside)
        tl.debug_barrier()  # the next leaf reads changes that other lanes have written
    before_all = tl.load(moved + row, mask=valid, other=0)
    tl.store(moved + row, (before_all != 0) | (steps > 0), mask=valid)


@triton.jit(do_not_specialize=["sweeps"])
def _descend_sweeps(
    scratch, D, codes, S, bounds, H, inverse, runs, moved,
    num_columns, rows, sweeps, H_row, H_column,
    LEAF: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    row, valid = own_rows(rows, ROWS)
    column = tl.max_contiguous(tl.arange(0, LEAF), 1)
    low = tl.load(bounds + row, mask=valid, other=0.0)
    high = tl.load(bounds + rows + row, mask=valid, other=0.0)
    everywhere = tl.zeros([ROWS, LEAF], tl.int32)
    own_scratch = scratch + column[None, :] * rows + row[:, None]
    steps = tl.zeros([ROWS], tl.float32)
    turn, moving = 0, 1
    while (turn < sweeps) & (moving > 0):
        steps = tl.zeros([ROWS], tl.float32)
        for first in range(0, num_columns, LEAF):
            k = first + column
            inside = (k < num_columns)[None, :] & valid[:, None]
            last = tl.minimum(k, num_columns - 1)  # beyond the end anything may be computed; it is not stored
            at = last[None, :] * rows + row[:, None]
            beside = H + last[None, :] * H_row + everywhere  # symmetric: of one line of memory all columns have some
            h = tl.load(beside + first * H_column)  # here, so that what the columns need is near when their turn comes
            d = tl.load(D + at, mask=inside, other=0.0)
            found = product_with(H, num_columns, last, rows, D, rows, H_row, H_column, LEAF, ROWS, DEPTH, HALF)
            tl.store(own_scratch, found, mask=valid[:, None])
            tl.debug_barrier()
            pulls = tl.load(own_scratch, mask=valid[:, None], other=0.0)
            changes, after, steps_of_leaf = _descend_leaf(
                pulls, codes, S, inverse, runs, h, beside, low, high, first, num_columns, rows, last, row, inside,
                H_column, LEAF, ROWS,
            )  # fmt: skip
            steps += steps_of_leaf
            tl.debug_barrier()  # all lanes have read the errors of this leaf before any lane changes them
            tl.store(D + at, d - changes, mask=inside)
            tl.store(codes + at, after.to(tl.int8), mask=inside)
            tl.debug_barrier()  # the next leaf reads errors that other lanes have written
        moving = (tl.sum(tl.where(valid, steps, 0.0), axis=0) > 0).to(tl.int32)
        turn += 1
    tl.store(moved + row, steps > 0, mask=valid)
