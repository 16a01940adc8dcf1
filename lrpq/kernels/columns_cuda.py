"""Some columns of GPTQ's sweep, for CUDA devices, in Triton."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from lrpq.kernels.threads import on_device_of

if TYPE_CHECKING:
    from torch import Tensor

ROWS = 32
"""Rows of a program: one a thread of a single warp, so that what a column does to the next needs no other thread."""


def round_columns(T: Tensor, W: Tensor, S: Tensor, R: Tensor, bounds: Tensor, runs: Tensor, codes: Tensor) -> None:
    """See `lrpq.kernels.columns.round_columns`."""
    num_columns, choices, rows = T.shape
    with on_device_of(T):
        _round_columns[(triton.cdiv(rows, ROWS), choices)](
            T, W, S, R, bounds, runs, codes,
            num_columns, choices, rows, R.stride(0), R.stride(1),
            COLUMNS=triton.next_power_of_2(num_columns), ROWS=ROWS, num_warps=1,
        )  # fmt: skip


@triton.jit
def _round_columns(
    T, W, S, R, bounds, runs, codes,
    num_columns, choices, rows, R_row, R_column,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    choice = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    valid = row < rows
    low, high = tl.load(bounds + 2 * choice), tl.load(bounds + 2 * choice + 1)
    place = (column[:, None] * choices + choice) * rows + row[None, :]
    inside = (column[:, None] < num_columns) & valid[None, :]
    targets = tl.load(T + place, mask=inside, other=0.0)
    for k in range(num_columns):
        run = tl.load(runs + k)
        s = tl.load(S + (run * choices + choice) * rows + row, mask=valid, other=1.0)
        w = tl.load(W + k * rows + row, mask=valid, other=0.0)
        later = (column > k) & (column < num_columns)
        pull = tl.load(R + k * R_row + column * R_column, mask=later, other=0.0)
        target = tl.sum(tl.where(column[:, None] == k, targets, 0.0), axis=0)
        q = tl.minimum(tl.maximum(tl.div_rn(target, s), low), high)
        q = (q + 12582912.0) - 12582912.0  # to the nearest, half to even: 1.5 * 2^23 leaves no binary places
        error = w - q * s
        at = (k * choices + choice) * rows + row
        tl.store(T + at, error, mask=valid)
        tl.store(codes + at, q.to(tl.int8), mask=valid)
        targets += pull[:, None] * error[None, :]
