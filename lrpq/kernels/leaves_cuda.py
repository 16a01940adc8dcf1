"""What kernels for CUDA devices that take columns one after another have in common, in Triton.

A program is one warp with a row a lane. It takes the columns leaf by leaf: of a leaf every lane holds its row's numbers
in registers, so that what a column does to the next needs no other lane and no memory. What all leaves before do to a
leaf is a product of matrices and goes through the tensor cores, whose results lie across lanes otherwise: they pass
through memory. That neighbours lie side by side in memory is hidden from the compiler (``max_contiguous``), which would
load four at once and then move them between lanes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

LEAF = 16
"""Columns whose numbers are in registers together."""
ROWS = 32
"""Rows of a program."""
DEPTH = 32
"""Columns of the past that are multiplied together."""


def half_of(tensor: Tensor) -> tl.dtype:
    """What halves are multiplied as."""
    return tl.bfloat16 if tensor.is_cuda else tl.float32


@triton.jit
def own_rows(rows, ROWS: tl.constexpr):
    """Rows of this program, and which of them there are."""
    row = tl.program_id(0) * ROWS + tl.max_contiguous(tl.arange(0, ROWS), 1)
    return row, row < rows


@triton.jit
def picked(values, now):
    """Of each row the number of one column: ``values`` [ROWS, LEAF], ``now`` [1, LEAF]. Exact, by bits: a sum with
    zeros would be computed, an exclusive or with zeros is left out."""
    bits = tl.where(now, values.to(tl.int32, bitcast=True), 0)
    return tl.xor_sum(bits, axis=1).to(tl.float32, bitcast=True)


@triton.jit
def to_nearest(x):
    """To the nearest integer, half to even, of a small number: 1.5 * 2^23 leaves no binary places."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def product_with(
    matrix, stop, last, rows, values, values_row, matrix_row, matrix_column,
    LEAF: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """sum_p matrix[p, k] values[p, row] over p < stop, for the columns k = ``last`` of a leaf: [ROWS, LEAF], by halves
    (quant/halves.py); ``HALF`` is bfloat16, or float32 for Triton's interpreter, which multiplies no others."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # here neighbours may be loaded together
    valid = row < rows
    total = tl.zeros([ROWS, LEAF], tl.float32)
    for start in range(0, stop, DEPTH):
        p = start + tl.arange(0, DEPTH)
        there = p < stop
        left = tl.load(values + p[None, :] * values_row + row[:, None], mask=there[None, :] & valid[:, None], other=0.0)
        right = tl.load(
            matrix + p[:, None] * matrix_row + last[None, :] * matrix_column, mask=there[:, None], other=0.0
        )
        leading, also = left.to(tl.bfloat16), right.to(tl.bfloat16)
        rest, as_well = (left - leading.to(tl.float32)).to(tl.bfloat16), (right - also.to(tl.float32)).to(tl.bfloat16)
        total = tl.dot(rest.to(HALF), also.to(HALF), total)
        total = tl.dot(leading.to(HALF), as_well.to(HALF), total)
        total = tl.dot(leading.to(HALF), also.to(HALF), total)
    return total


@triton.jit
def store_halves(place, distance, errors, inside):
    """The errors' leading digits, what these leave, and the leading ones again, so far apart (quant/halves.py)."""
    leading = errors.to(tl.bfloat16)
    tl.store(place, leading, mask=inside)
    tl.store(place + distance, (errors - leading.to(tl.float32)).to(tl.bfloat16), mask=inside)
    tl.store(place + 2 * distance, leading, mask=inside)
