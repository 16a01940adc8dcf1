"""The search for scales, for CUDA devices, in Triton: one program for 32 rows of a group, all steps inside."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from lrpq.kernels.leaves_cuda import ROWS
from lrpq.kernels.threads import on_device_of

if TYPE_CHECKING:
    from torch import Tensor

HEAD = 5
"""Columns of the table before the divisors: lowest and highest code, number of divisors, number of refits, and 1 where
all but the first scale have the sign that gives the extremum the extra code."""
STEPS = 16
"""Scales tried in one pass over a group: their errors stay in registers, one row a thread."""


def search_scales(W: Tensor, importance: Tensor, table: Tensor, scales: Tensor, *, scale_bits: int) -> None:
    """Best scales of every group, row and choice, as `lrpq.quant.scale_search` defines them.

    Sums run over columns in their order, as in the loops for CPUs. A group's weights are read once for every 16 scales
    tried and once a refit, from caches after the first time; in memory nothing else is.

    Args:
        W: weights [groups, width, rows], float32 or narrower, any strides.
        importance: [groups, width], float32, contiguous.
        table: a row for each choice: ``HEAD`` numbers, then what the largest weight is divided by, in the order in
            which of equal errors the first wins; float32, contiguous.
        scales: written, bfloat16 [choices, groups, rows], any strides.
        scale_bits: of what they are stored as, 16 or 8; they are rounded to that.
    """
    groups, width, rows = W.shape
    row_blocks = triton.cdiv(rows, ROWS)
    with on_device_of(W):
        _search[(groups * row_blocks, len(table))](
            W, importance, table, scales,
            width, rows, row_blocks, table.stride(0), *W.stride(), *scales.stride(),
            HEAD=HEAD, STEPS=STEPS, ROWS=ROWS, SCALE_BITS=scale_bits, num_warps=1,
        )  # fmt: skip


@triton.jit
def _search(
    W, importance, table, scales,
    width, rows, row_blocks, entries, W_group, W_column, W_row, S_choice, S_group, S_row,
    HEAD: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr, SCALE_BITS: tl.constexpr,
):  # fmt: skip
    choice = tl.program_id(1).to(tl.int64)
    group = (tl.program_id(0) // row_blocks).to(tl.int64)
    row = (tl.program_id(0) % row_blocks) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    own = W + group * W_group + row.to(tl.int64) * W_row
    weights = importance + group * width
    table += choice * entries
    bottom, top = tl.load(table), tl.load(table + 1)
    count, refits = tl.load(table + 2).to(tl.int32), tl.load(table + 3).to(tl.int32)
    low, high = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for k in range(width):
        w = tl.load(own + k * W_column, mask=valid, other=0.0).to(tl.float32)
        low, high = tl.minimum(low, w), tl.maximum(high, w)
    largest = tl.maximum(high, -low)
    # a power of two near the largest weight and its reciprocal, by their exponents: both are normal numbers
    exponent = tl.minimum(tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) & 255, 1), 253)
    exponent = tl.where(largest == 0, 127, exponent)
    unit = (exponent << 23).to(tl.float32, bitcast=True)
    per_unit = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    base = tl.where(largest == 0, -bottom - 0.5, largest * per_unit)  # a group of zeros: any scale, 1 comes first
    signed = tl.where(high > -low, base * (1 - 2 * tl.load(table + 4)), base)

    best, least = tl.zeros([ROWS], tl.float32), tl.full([ROWS], float("inf"), tl.float32)
    for start in range(0, count, STEPS):
        step = start + tl.arange(0, STEPS)
        divisor = tl.load(table + HEAD + step, mask=step < count, other=1.0)
        dividend = tl.where(step[:, None] == 0, base[None, :], signed[None, :])
        tried = tl.div_rn(dividend, tl.broadcast_to(divisor[:, None], [STEPS, ROWS]))
        tried = to_stored(tried, unit[None, :], per_unit[None, :], SCALE_BITS)
        inverse = tl.div_rn(tl.full([STEPS, ROWS], 1.0, tl.float32), tried)
        errors = tl.zeros([STEPS, ROWS], tl.float32)
        # the next column is loaded while this one is computed with
        w_next = tl.load(own, mask=valid, other=0.0).to(tl.float32)
        v_next = tl.load(weights)
        for k in range(width):
            w, v = w_next * per_unit, v_next
            more = k + 1 < width
            w_next = tl.load(own + (k + 1) * W_column, mask=valid & more, other=0.0).to(tl.float32)
            v_next = tl.load(weights + k + 1, mask=more, other=0.0)
            x = w[None, :] * inverse
            q = tl.minimum(tl.maximum(x, bottom), top)
            d = x - ((q + 12582912.0) - 12582912.0)  # to the nearest, half to even: 1.5 * 2^23 leaves no binary places
            errors += v * (d * d)
        errors = tl.where(step[:, None] < count, errors * tried * tried, float("inf"))
        found = tl.min(errors, axis=0)
        first = tl.min(tl.where(errors == found[None, :], step[:, None], count), axis=0)
        scale = tl.sum(tl.where(step[:, None] == first[None, :], tried, 0.0), axis=0)
        better = (found < least) | (best == 0)
        best, least = tl.where(better, scale, best), tl.where(better, found, least)

    for _ in range(refits):
        inverse = tl.div_rn(tl.full([ROWS], 1.0, tl.float32), best)
        product, squares = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
        w_next = tl.load(own, mask=valid, other=0.0).to(tl.float32)
        v_next = tl.load(weights)
        for k in range(width):
            w, v = w_next * per_unit, v_next
            more = k + 1 < width
            w_next = tl.load(own + (k + 1) * W_column, mask=valid & more, other=0.0).to(tl.float32)
            v_next = tl.load(weights + k + 1, mask=more, other=0.0)
            q = tl.minimum(tl.maximum(w * inverse, bottom), top)
            q = (q + 12582912.0) - 12582912.0
            product += v * (w * q)
            squares += v * (q * q)
        # of a group whose codes are all zero: nothing is gained
        refitted = tl.div_rn(product, tl.where(squares > 0, squares, 1.0))
        refitted = to_stored(refitted, unit, per_unit, SCALE_BITS)
        gains = (refitted - best) * ((refitted + best) * squares - 2 * product) < 0
        best = tl.where(gains, refitted, best)

    smallest, limit = 1.1754943508222875e-38, 3.3895313892515355e38 / -bottom
    scale = best * unit
    scale = tl.where(tl.abs(scale) < smallest, tl.where(best < 0, -smallest, smallest), scale)
    scale = tl.minimum(tl.maximum(scale, -limit), limit)
    at = choice * S_choice + group * S_group + row.to(tl.int64) * S_row
    tl.store(scales + at, scale.to(tl.bfloat16), mask=valid)


@triton.jit
def to_stored(x, unit, per_unit, SCALE_BITS: tl.constexpr):
    """Scales in units of a power of two, as they are stored: bfloat16 has the same digits in any unit."""
    return to_bfloat16(x) if SCALE_BITS == 16 else to_float8(x * unit) * per_unit


@triton.jit
def to_float8(x):
    """Rounded to e4m3, half to even, of a magnitude from 2^-9 to 448, as `lrpq.quant.stored_scales.nearest` does."""
    x = tl.minimum(tl.maximum(x, -448.0), 448.0)
    bits = x.to(tl.int32, bitcast=True)
    bits += 524287 + ((bits >> 20) & 1)
    normal = (bits & -1048576).to(tl.float32, bitcast=True)
    few = ((x * 512 + 12582912.0) - 12582912.0) * 0.001953125  # below 2^-6 in steps of 2^-9
    rounded = tl.where(tl.abs(x) < 0.015625, few, normal)
    return tl.where(tl.abs(rounded) < 0.001953125, tl.where(x < 0, -0.001953125, 0.001953125), rounded)


@triton.jit
def to_bfloat16(x):
    """Rounded to bfloat16, half to even, and infinity stays so; by bits, as Triton's interpreter would cut them off."""
    bits = x.to(tl.int32, bitcast=True)
    bits += 32767 + ((bits >> 16) & 1)
    return (bits & -65536).to(tl.float32, bitcast=True)
