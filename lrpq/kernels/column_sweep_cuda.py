"""GPTQ's whole sweep over the columns of a small layer in one launch, for CUDA devices, in Triton.

A layer of a few hundred inputs takes less time than the launches of its leaves and of the products between them. Here a
program keeps a few rows, a warp wide: leaf after leaf it gathers what all columns before have left, then rounds the
leaf's columns one after another. Every lane holds a column's targets in registers; contiguity is hidden from the
compiler, which would load four neighbours at once and then move them between lanes at every column.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from lrpq.kernels.threads import on_device_of

if TYPE_CHECKING:
    from torch import Tensor

LEAF = 32
"""Columns whose targets are in registers together."""
ROWS = 8
"""Rows of a program: four lanes a row, so that few rows still make many programs."""
AT_ONCE = 8
"""Columns of the past that are loaded together."""


def sweep_columns(T: Tensor, W: Tensor, S: Tensor, R: Tensor, bounds: Tensor, runs: Tensor, codes: Tensor) -> None:
    """`lrpq.kernels.columns.round_columns` of all columns, with the products between its leaves.

    Args:
        T: written: errors W - Q [columns, choices, rows], float32, contiguous; what it held is not read.
        W: the weights [columns, rows], contiguous, columns in the order of the sweep.
        S: scales of the runs of columns that share one [runs, choices, rows], contiguous.
        R: the factor [columns, columns], unit diagonal, any strides.
        bounds: smallest and largest code of every choice [choices, 2].
        runs: row of S for each column, int64.
        codes: written, int8, as T.
    """
    num_columns, choices, rows = T.shape
    R = R.contiguous()  # a factorisation's columns may lie side by side
    with on_device_of(T):
        _sweep_columns[(triton.cdiv(rows, ROWS), choices)](
            T, W, S, R, bounds, runs, codes,
            num_columns, choices, rows, R.stride(0), R.stride(1),
            LEAF=LEAF, ROWS=ROWS, AT_ONCE=AT_ONCE, num_warps=1,
        )  # fmt: skip


@triton.jit
def _sweep_columns(
    T, W, S, R, bounds, runs, codes,
    num_columns, choices, rows, R_row, R_column,
    LEAF: tl.constexpr, ROWS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    choice = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.max_contiguous(tl.arange(0, ROWS), 1)
    column = tl.max_contiguous(tl.arange(0, LEAF), 1)
    valid = row < rows
    low, high = tl.load(bounds + 2 * choice), tl.load(bounds + 2 * choice + 1)
    everywhere = tl.zeros([ROWS, LEAF], tl.int32)
    for first in range(0, num_columns, LEAF):
        k = first + column
        inside = (k < num_columns)[None, :] & valid[:, None]
        last = tl.minimum(k, num_columns - 1)  # beyond the end anything may be computed; it is not stored
        run = tl.load(runs + last).to(tl.int32)
        w = tl.load(W + last[None, :] * rows + row[:, None], mask=inside, other=0.0)
        s = tl.load(S + (run[None, :] * choices + choice) * rows + row[:, None], mask=inside, other=1.0)
        pulled = R + last[None, :] * R_column + everywhere
        targets = w
        for past in range(0, first, AT_ONCE):
            for i in tl.static_range(AT_ONCE):
                error = tl.load(T + ((past + i) * choices + choice) * rows + row, mask=valid, other=0.0)
                targets += tl.load(pulled + (past + i) * R_row) * error[:, None]
        errors, rounded = tl.zeros([ROWS, LEAF], tl.float32), tl.zeros([ROWS, LEAF], tl.float32)
        for i in tl.static_range(LEAF):
            now = (column == i)[None, :]
            target = tl.sum(tl.where(now, targets, 0.0), axis=1)
            weight = tl.sum(tl.where(now, w, 0.0), axis=1)
            scale = tl.sum(tl.where(now, s, 0.0), axis=1)
            q = tl.minimum(tl.maximum(tl.div_rn(target, scale), low), high)
            q = (q + 12582912.0) - 12582912.0  # to the nearest, half to even: 1.5 * 2^23 leaves no binary places
            error = weight - q * scale
            errors = tl.where(now, error[:, None], errors)
            rounded = tl.where(now, q[:, None], rounded)
            pull = tl.load(pulled + tl.minimum(first + i, num_columns - 1) * R_row)
            targets += tl.where((column > i)[None, :], pull, 0.0) * error[:, None]
        at = (last[None, :] * choices + choice) * rows + row[:, None]
        tl.store(T + at, errors, mask=inside)
        tl.store(codes + at, rounded.to(tl.int8), mask=inside)
        tl.debug_barrier()  # the next leaf reads errors that other lanes have written
