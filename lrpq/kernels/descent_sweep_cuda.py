"""Sweeps of coordinate descent over a small layer in one launch, for CUDA devices, in Triton.

As in `lrpq.kernels.column_sweep_cuda`: a program keeps a few rows, and what the rest of a sweep would be launched for
(the products with all of H, the question whether any row still moves) it does itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from lrpq.kernels.column_sweep_cuda import AT_ONCE, LEAF, ROWS
from lrpq.kernels.threads import on_device_of

if TYPE_CHECKING:
    from torch import Tensor


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
    H = H.contiguous()
    with on_device_of(D):
        _descend_sweeps[(triton.cdiv(rows, ROWS),)](
            D, codes, S, bounds, H, inverse, runs, moved,
            num_columns, rows, sweeps, H.stride(0), H.stride(1),
            LEAF=LEAF, ROWS=ROWS, AT_ONCE=AT_ONCE, num_warps=1,
        )  # fmt: skip


@triton.jit(do_not_specialize=["sweeps"])
def _descend_sweeps(
    D, codes, S, bounds, H, inverse, runs, moved,
    num_columns, rows, sweeps, H_row, H_column,
    LEAF: tl.constexpr, ROWS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.max_contiguous(tl.arange(0, ROWS), 1)
    column = tl.max_contiguous(tl.arange(0, LEAF), 1)
    valid = row < rows
    low = tl.load(bounds + row, mask=valid, other=0.0)
    high = tl.load(bounds + rows + row, mask=valid, other=0.0)
    everywhere = tl.zeros([ROWS, LEAF], tl.int32)
    steps = tl.zeros([ROWS], tl.float32)
    whole = num_columns // AT_ONCE * AT_ONCE
    turn, moving = 0, 1
    while (turn < sweeps) & (moving > 0):
        steps = tl.zeros([ROWS], tl.float32)
        for first in range(0, num_columns, LEAF):
            k = first + column
            inside = (k < num_columns)[None, :] & valid[:, None]
            last = tl.minimum(k, num_columns - 1)  # beyond the end anything may be computed; it is not stored
            at = last[None, :] * rows + row[:, None]
            run = tl.load(runs + last).to(tl.int32)
            s = tl.load(S + run[None, :] * rows + row[:, None], mask=inside, other=1.0)
            code = tl.load(codes + at, mask=inside, other=0).to(tl.float32)
            # of tiny scales and inputs: infinity times zero would be no number
            reach = tl.div_rn(tl.load(inverse + last)[None, :] + tl.zeros([ROWS, LEAF], tl.float32), s)
            reach = tl.minimum(tl.maximum(reach, -3.4028234e38), 3.4028234e38)
            beside = H + last[None, :] * H_column + everywhere
            pulls = tl.zeros([ROWS, LEAF], tl.float32)
            for other in range(0, whole, AT_ONCE):
                for i in tl.static_range(AT_ONCE):
                    d = tl.load(D + (other + i) * rows + row, mask=valid, other=0.0)
                    pulls += tl.load(beside + (other + i) * H_row) * d[:, None]
            for other in range(whole, num_columns):
                d = tl.load(D + other * rows + row, mask=valid, other=0.0)
                pulls += tl.load(beside + other * H_row) * d[:, None]
            changes, after = tl.zeros([ROWS, LEAF], tl.float32), code
            for i in tl.static_range(LEAF):
                now = (column == i)[None, :]
                pull = tl.sum(tl.where(now, pulls, 0.0), axis=1)
                scale = tl.sum(tl.where(now, s, 0.0), axis=1)
                before = tl.sum(tl.where(now, code, 0.0), axis=1)
                n = tl.minimum(
                    tl.maximum(pull * tl.sum(tl.where(now, reach, 0.0), axis=1), low - before), high - before
                )
                n = (n + 12582912.0) - 12582912.0  # to the nearest, half to even: 1.5 * 2^23 leaves no binary places
                n = tl.where(first + i < num_columns, n, 0.0)
                change = n * scale
                steps += tl.abs(n)
                changes = tl.where(now, change[:, None], changes)
                after = tl.where(now, (before + n)[:, None], after)
                h = tl.load(beside + tl.minimum(first + i, num_columns - 1) * H_row)
                pulls -= tl.where((column > i)[None, :], h, 0.0) * change[:, None]
            d = tl.load(D + at, mask=inside, other=0.0)
            tl.debug_barrier()  # all lanes have read the errors of this leaf before any lane changes them
            tl.store(D + at, d - changes, mask=inside)
            tl.store(codes + at, after.to(tl.int8), mask=inside)
            tl.debug_barrier()  # the next leaf reads errors that other lanes have written
        moving = (tl.sum(tl.where(valid, steps, 0.0), axis=0) > 0).to(tl.int32)
        turn += 1
    tl.store(moved + row, steps > 0, mask=valid)
