"""Products of codes of two groups under H, for CUDA devices, in Triton: the systems of quant/refit.py.

Codes are bfloat16 numbers; H is taken by its bfloat16 halves (quant/halves.py), which keep 16 of its 24 binary digits,
so that a product is two of the card's fast ones. Sums are float32. Triton's interpreter multiplies no bfloat16; there
the halves are widened, which changes no product.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from lrpq.kernels.threads import on_device_of

if TYPE_CHECKING:
    from torch import Tensor

ROWS = 128
LARGEST_BLOCK = 64
"""Columns of a product. 128 x 64 numbers of it are 64 registers a lane; on one H100 a 70B block's refits take 1.2 s
with these and took 1.4 with 64 x 32 in float32 (docs/log.md). Not swept."""


def group_products(codes: Tensor, H: Tensor, A: Tensor) -> None:
    """A_rgh = Z_rg H_gh Z_rh^T for every row and pair of groups; no temporary is written.

    Each pair once: d_in^2 / 2 multiply-adds a row, twice over. A differs from float64's as if every entry of H were
    rounded to 2^-17 of itself.

    Args:
        codes: Z [rows, d_in], int8, each row contiguous.
        H: [d_in, d_in], float32, symmetric, any strides.
        A: written, [rows, groups, groups], float64, contiguous.
    """
    rows, d_in = codes.shape
    groups = A.shape[1]
    width = d_in // groups
    block = min(LARGEST_BLOCK, max(16, triton.next_power_of_2(width)))  # 16 is the least that a product takes
    with on_device_of(codes):
        _group_products[(groups * groups, triton.cdiv(rows, ROWS))](
            codes, H, A,
            rows, groups, width, codes.stride(0), H.stride(0), H.stride(1),
            ROWS=ROWS, BLOCK=block, HALF=tl.bfloat16 if codes.is_cuda else tl.float32, num_warps=4,
        )  # fmt: skip


@triton.jit
def _group_products(
    codes, H, A,
    rows, groups, width, Z_row, H_row, H_column,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    g, h = tl.program_id(0) // groups, tl.program_id(0) % groups
    if h >= g:
        row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        valid = row < rows
        column = tl.arange(0, BLOCK)
        Z = codes + row[:, None].to(tl.int64) * Z_row
        total = tl.zeros([ROWS], tl.float32)
        for right in range(0, width, BLOCK):
            to = right + column
            product = tl.zeros([ROWS, BLOCK], tl.float32)
            for left in range(0, width, BLOCK):
                out_of = left + column
                z = tl.load(Z + (g * width + out_of)[None, :], mask=valid[:, None] & (out_of < width)[None, :], other=0)
                at = (g * width + out_of)[:, None].to(tl.int64) * H_row + (h * width + to)[None, :] * H_column
                own = tl.load(H + at, mask=(out_of < width)[:, None] & (to < width)[None, :], other=0.0)
                high = own.to(tl.bfloat16)
                low = (own - high.to(tl.float32)).to(tl.bfloat16)
                own_codes = z.to(tl.float32).to(HALF)
                product = tl.dot(own_codes, high.to(HALF), product)
                product = tl.dot(own_codes, low.to(HALF), product)
            z = tl.load(Z + (h * width + to)[None, :], mask=valid[:, None] & (to < width)[None, :], other=0)
            total += tl.sum(product * z.to(tl.float32), axis=1)
        place = A + row.to(tl.int64) * groups * groups
        tl.store(place + g * groups + h, total.to(tl.float64), mask=valid)
        tl.store(place + h * groups + g, total.to(tl.float64), mask=valid)
