"""Errors of quantized rows and quadratic forms in them, for CUDA devices, in Triton: one launch for a chain of small
operations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from lrpq.kernels.threads import on_device_of

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1024
"""Columns that a program of a row sees at a time."""


def write_errors(T: Tensor, codes: Tensor, scales: Tensor, out: Tensor) -> None:
    """T - Q for Q of codes and the scales of their groups, exact but for the difference's own rounding.

    Args:
        T: targets [rows, d_in], float32 or narrower, any strides.
        codes: int8, any strides.
        scales: bfloat16 [rows, groups], contiguous.
        out: written, float32 [rows, d_in], any strides.
    """
    rows, d_in = T.shape
    with on_device_of(T):
        _write_errors[(rows, triton.cdiv(d_in, BLOCK))](
            T, codes, scales, out,
            d_in, scales.shape[1], d_in // scales.shape[1], *T.stride(), *codes.stride(), *out.stride(),
            BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip


def quadratic_forms(dW: Tensor, H: Tensor) -> Tensor:
    """dW_j H dW_j^T of every row, float64; dW is left in units of a power of two of each row.

    The product is the matrix library's; entries times errors are rounded to float32, their sums are float64.

    Args:
        dW: [rows, d_in], float32, contiguous.
        H: [d_in, d_in].
    """
    rows, d_in = dW.shape
    unit, forms = dW.new_empty(rows), dW.new_empty(rows, dtype=torch.float64)
    with on_device_of(dW):
        _to_units[(rows,)](dW, unit, d_in, BLOCK=BLOCK, num_warps=4)
        product = dW @ H
        _sum_products[(rows,)](product, dW, unit, forms, d_in, BLOCK=BLOCK, num_warps=4)
    return forms


@triton.jit
def _write_errors(
    T, codes, scales, out,
    d_in, groups, width, T_row, T_column, codes_row, codes_column, out_row, out_column,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < d_in
    t = tl.load(T + row * T_row + column.to(tl.int64) * T_column, mask=inside, other=0.0).to(tl.float32)
    q = tl.load(codes + row * codes_row + column.to(tl.int64) * codes_column, mask=inside, other=0).to(tl.float32)
    s = tl.load(scales + row * groups + column // width, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_row + column.to(tl.int64) * out_column, t - q * s, mask=inside)


@triton.jit
def _to_units(dW, unit, d_in, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, d_in, BLOCK):
        column = start + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.abs(tl.load(dW + row * d_in + column, mask=column < d_in, other=0.0)))
    whole = tl.max(largest, axis=0)
    # a power of two near the largest and its reciprocal, by their exponents: both are normal numbers
    exponent = tl.minimum(tl.maximum((whole.to(tl.int32, bitcast=True) >> 23) & 255, 1), 253)
    exponent = tl.where(whole == 0, 127, exponent)
    per_unit = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    for start in range(0, d_in, BLOCK):
        column = start + tl.arange(0, BLOCK)
        at = dW + row * d_in + column
        tl.store(at, tl.load(at, mask=column < d_in, other=0.0) * per_unit, mask=column < d_in)
    tl.store(unit + row, (exponent << 23).to(tl.float32, bitcast=True))


@triton.jit
def _sum_products(product, dW, unit, forms, d_in, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, d_in, BLOCK):
        column = start + tl.arange(0, BLOCK)
        at = row * d_in + column
        x = tl.load(product + at, mask=column < d_in, other=0.0)
        total += (x * tl.load(dW + at, mask=column < d_in, other=0.0)).to(tl.float64)
    u = tl.load(unit + row).to(tl.float64)
    tl.store(forms + row, tl.sum(total, axis=0) * u * u)
