"""Some columns of a sweep of coordinate descent, for CUDA devices, in Triton."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from lrpq.kernels.columns_cuda import ROWS
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
    """See `lrpq.kernels.descent.descend_columns`."""
    num_columns, rows = D.shape
    with on_device_of(D):
        _descend_columns[(triton.cdiv(rows, ROWS),)](
            G, D, codes, S, bounds, own, inverse, runs, moved,
            num_columns, rows, own.stride(0), own.stride(1),
            COLUMNS=triton.next_power_of_2(num_columns), ROWS=ROWS, num_warps=1,
        )  # fmt: skip


@triton.jit
def _descend_columns(
    G, D, codes, S, bounds, own, inverse, runs, moved,
    num_columns, rows, own_row, own_column,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    valid = row < rows
    low = tl.load(bounds + row, mask=valid, other=0.0)
    high = tl.load(bounds + rows + row, mask=valid, other=0.0)
    inside = (column[:, None] < num_columns) & valid[None, :]
    pulls = tl.load(G + column[:, None] * rows + row[None, :], mask=inside, other=0.0)
    steps = tl.zeros([ROWS], tl.float32)
    for k in range(num_columns):
        run = tl.load(runs + k)
        s = tl.load(S + run * rows + row, mask=valid, other=1.0)
        at = k * rows + row
        code = tl.load(codes + at, mask=valid, other=0).to(tl.float32)
        d = tl.load(D + at, mask=valid, other=0.0)
        later = (column > k) & (column < num_columns)
        h = tl.load(own + k * own_row + column * own_column, mask=later, other=0.0)
        pull = tl.sum(tl.where(column[:, None] == k, pulls, 0.0), axis=0)
        # of tiny scales and inputs: infinity times zero would be no number
        reach = tl.minimum(tl.maximum(tl.div_rn(tl.load(inverse + k), s), -3.4028234e38), 3.4028234e38)
        n = tl.minimum(tl.maximum(pull * reach, low - code), high - code)
        n = (n + 12582912.0) - 12582912.0  # to the nearest, half to even: 1.5 * 2^23 leaves no binary places
        change = n * s
        tl.store(D + at, d - change, mask=valid)
        tl.store(codes + at, (code + n).to(tl.int8), mask=valid)
        steps += tl.abs(n)
        pulls -= h[:, None] * change[None, :]
    before = tl.load(moved + row, mask=valid, other=0)
    tl.store(moved + row, (before != 0) | (steps > 0), mask=valid)
