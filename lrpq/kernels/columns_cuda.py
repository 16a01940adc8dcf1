"""Columns of GPTQ's sweep, for CUDA devices, in Triton: some of them, or all of a small layer in one launch."""

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


def round_columns(
    T: Tensor,
    W: Tensor,
    S: Tensor,
    R: Tensor,
    bounds: Tensor,
    runs: Tensor,
    codes: Tensor,
    halves: Tensor | None = None,
    *,
    fresh: bool = False,
) -> None:
    """See `lrpq.kernels.columns.round_columns`.

    Args:
        T: targets, and afterwards the errors W - Q [columns, choices, rows], float32, contiguous.
        W: the weights [columns, rows], contiguous, columns in the order of the sweep.
        S: scales of the runs of columns that share one [runs, choices, rows], contiguous.
        R: these columns' block of the factor [columns, columns], unit diagonal, any strides.
        bounds: smallest and largest code of every choice [choices, 2].
        runs: row of S for each column, int64.
        codes: written, int8, as T.
        halves: written where given: bfloat16 [columns, 3, choices, rows], contiguous: the errors' leading digits, what
            these leave, and the leading ones again (quant/halves.py).
        fresh: no columns are before these: the targets are the weights, and what T held is not read.
    """
    num_columns, choices, rows = T.shape
    if R.stride(0) != 1:
        R = R.T.contiguous().T  # a leaf's rows beside each other: what one column fetches the next ones need too
    with on_device_of(T):
        _round_columns[(triton.cdiv(rows, ROWS), choices)](
            T, W, S, R, bounds, runs, codes, T if halves is None else halves,
            num_columns, choices, rows, R.stride(0), R.stride(1),
            FRESH=fresh, HALVES=halves is not None, LEAF=LEAF, ROWS=ROWS, DEPTH=DEPTH, HALF=half_of(T), num_warps=1,
        )  # fmt: skip


@triton.jit
def _round_columns(
    T, W, S, R, bounds, runs, codes, halves,
    num_columns, choices, rows, R_row, R_column,
    FRESH: tl.constexpr, HALVES: tl.constexpr, LEAF: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    choice = tl.program_id(1)
    row, valid = own_rows(rows, ROWS)
    column = tl.max_contiguous(tl.arange(0, LEAF), 1)
    low, high = tl.load(bounds + 2 * choice), tl.load(bounds + 2 * choice + 1)
    everywhere = tl.zeros([ROWS, LEAF], tl.int32)
    for first in range(0, num_columns, LEAF):
        k = first + column
        inside = (k < num_columns)[None, :] & valid[:, None]
        last = tl.minimum(k, num_columns - 1)  # beyond the end anything may be computed; it is not stored
        at = (last[None, :] * choices + choice) * rows + row[:, None]
        run = tl.load(runs + last).to(tl.int32)
        w = tl.load(W + last[None, :] * rows + row[:, None], mask=inside, other=0.0)
        s = tl.load(S + (run[None, :] * choices + choice) * rows + row[:, None], mask=inside, other=1.0)
        beside = R + last[None, :] * R_column + everywhere
        before = w if FRESH else tl.load(T + at, mask=inside, other=0.0)
        pull = tl.load(beside + first * R_row)  # here, so that what the columns need is near when their turn comes
        if first > 0:
            pulls = product_with(
                R, first, last, rows, T + choice * rows, choices * rows, R_row, R_column,
                LEAF, ROWS, DEPTH, HALF,
            )  # fmt: skip
            tl.store(T + at, before + pulls, mask=inside)
            tl.debug_barrier()
        elif FRESH:
            tl.store(T + at, w, mask=inside)
            tl.debug_barrier()
        targets = tl.load(T + at, mask=inside, other=0.0)
        inverse = tl.div_rn(tl.full([ROWS, LEAF], 1.0, tl.float32), s)
        errors, rounded = tl.zeros([ROWS, LEAF], tl.float32), tl.zeros([ROWS, LEAF], tl.float32)
        for i in tl.static_range(LEAF):
            now, later = (column == i)[None, :], (column > i)[None, :]
            q = picked(targets, now) * picked(inverse, now)
            q = to_nearest(tl.minimum(tl.maximum(q, low), high))
            error = picked(w, now) - q * picked(s, now)
            errors = tl.where(now, error[:, None], errors)
            rounded = tl.where(now, q[:, None], rounded)
            if i > 0:
                pull = tl.load(beside + tl.minimum(first + i, num_columns - 1) * R_row, mask=later, other=0.0)
            targets = tl.where(later, targets + pull * error[:, None], targets)
        tl.debug_barrier()  # all lanes have read what other lanes change
        tl.store(T + at, errors, mask=inside)
        tl.store(codes + at, rounded.to(tl.int8), mask=inside)
        if HALVES:
            place = halves + (last[None, :] * 3 * choices + choice) * rows + row[:, None]
            store_halves(place, choices * rows, errors, inside)
        tl.debug_barrier()  # the next leaf reads errors that other lanes have written
