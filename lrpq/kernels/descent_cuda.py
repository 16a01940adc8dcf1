"""Some columns of a sweep of coordinate descent, for CUDA devices, in Triton.

A program keeps a few rows and takes the columns leaf by leaf: what a leaf needs is in registers before its columns
follow each other, for a number that is fetched in between costs more than a column.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from lrpq.kernels.column_sweep_cuda import AT_ONCE, LEAF, ROWS
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
) -> None:
    """See `lrpq.kernels.descent.descend_columns`; G ends as the changes of the errors."""
    num_columns, rows = D.shape
    own = own.contiguous()
    with on_device_of(D):
        _descend_columns[(triton.cdiv(rows, ROWS),)](
            G, D, codes, S, bounds, own, inverse, runs, moved,
            num_columns, rows, own.stride(0), own.stride(1),
            LEAF=LEAF, ROWS=ROWS, AT_ONCE=AT_ONCE, num_warps=1,
        )  # fmt: skip


@triton.jit
def _descend_columns(
    G, D, codes, S, bounds, own, inverse, runs, moved,
    num_columns, rows, own_row, own_column,
    LEAF: tl.constexpr, ROWS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.max_contiguous(tl.arange(0, ROWS), 1)
    column = tl.max_contiguous(tl.arange(0, LEAF), 1)
    valid = row < rows
    low = tl.load(bounds + row, mask=valid, other=0.0)
    high = tl.load(bounds + rows + row, mask=valid, other=0.0)
    everywhere = tl.zeros([ROWS, LEAF], tl.int32)
    steps = tl.zeros([ROWS], tl.float32)
    for first in range(0, num_columns, LEAF):
        k = first + column
        inside = (k < num_columns)[None, :] & valid[:, None]
        last = tl.minimum(k, num_columns - 1)  # beyond the end anything may be computed; it is not stored
        at = last[None, :] * rows + row[:, None]
        run = tl.load(runs + last).to(tl.int32)
        s = tl.load(S + run[None, :] * rows + row[:, None], mask=inside, other=1.0)
        code = tl.load(codes + at, mask=inside, other=0).to(tl.float32)
        d = tl.load(D + at, mask=inside, other=0.0)
        pulls = tl.load(G + at, mask=inside, other=0.0)
        # of tiny scales and inputs: infinity times zero would be no number
        reach = tl.div_rn(tl.load(inverse + last)[None, :] + tl.zeros([ROWS, LEAF], tl.float32), s)
        reach = tl.minimum(tl.maximum(reach, -3.4028234e38), 3.4028234e38)
        beside = own + last[None, :] * own_column + everywhere
        for other in range(0, first, AT_ONCE):  # a leaf is a whole number of these
            for i in tl.static_range(AT_ONCE):
                changed = tl.load(G + (other + i) * rows + row, mask=valid, other=0.0)
                pulls -= tl.load(beside + (other + i) * own_row) * changed[:, None]
        changes, after = tl.zeros([ROWS, LEAF], tl.float32), code
        for i in tl.static_range(LEAF):
            now = (column == i)[None, :]
            pull = tl.sum(tl.where(now, pulls, 0.0), axis=1)
            scale = tl.sum(tl.where(now, s, 0.0), axis=1)
            before = tl.sum(tl.where(now, code, 0.0), axis=1)
            n = tl.minimum(tl.maximum(pull * tl.sum(tl.where(now, reach, 0.0), axis=1), low - before), high - before)
            n = (n + 12582912.0) - 12582912.0  # to the nearest, half to even: 1.5 * 2^23 leaves no binary places
            n = tl.where(first + i < num_columns, n, 0.0)
            change = n * scale
            steps += tl.abs(n)
            changes = tl.where(now, change[:, None], changes)
            after = tl.where(now, (before + n)[:, None], after)
            h = tl.load(beside + tl.minimum(first + i, num_columns - 1) * own_row)
            pulls -= tl.where((column > i)[None, :], h, 0.0) * change[:, None]
        tl.debug_barrier()  # all lanes have read what other lanes change
        tl.store(G + at, changes, mask=inside)
        tl.store(D + at, d - changes, mask=inside)
        tl.store(codes + at, after.to(tl.int8), mask=inside)
        tl.debug_barrier()  # the next leaf reads changes that other lanes have written
    before_all = tl.load(moved + row, mask=valid, other=0)
    tl.store(moved + row, (before_all != 0) | (steps > 0), mask=valid)
