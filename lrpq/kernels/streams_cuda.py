"""Weights out of packed streams, for CUDA devices, in Triton: a program a segment and 64 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from lrpq.kernels.threads import on_device_of

if TYPE_CHECKING:
    from torch import Tensor

_COLUMNS = 64


def decode_segments(words: Tensor, scales: Tensor, book: Tensor, out: Tensor, *, bits: int, rows: int) -> None:
    """Whole segments of `lrpq.quant.packed_streams.decode_streams`.

    Args:
        words: int32 [words, d_in], contiguous.
        scales: [all rows, groups], contiguous.
        book: float32, a value for each state.
        out: written, [all rows, d_in], contiguous.
        bits: of a symbol.
        rows: of a segment; rows of all whole segments are the first ones of ``scales`` and ``out``.
    """
    d_in = words.shape[1]
    with on_device_of(words):
        _decode[(len(out) // rows, triton.cdiv(d_in, _COLUMNS))](
            words, scales, book, out, d_in, scales.shape[1], d_in // scales.shape[1],
            BITS=bits, ROWS=rows, WORDS=rows * bits // 32, COLUMNS=_COLUMNS, STATES=len(book),
        )  # fmt: skip


@triton.jit
def _decode(
    words, scales, book, out, d_in, groups, width,
    BITS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, COLUMNS: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (column < d_in)[None, :]
    row = tl.arange(0, ROWS)
    lowest = (ROWS - 1 - row) * BITS
    word = lowest // 32
    own = words + segment * WORDS * d_in
    low = tl.load(own + word[:, None] * d_in + column[None, :], mask=inside, other=0).to(tl.int64) & 0xFFFFFFFF
    # above the highest word comes the lowest: the number repeats
    high = tl.load(own + ((word + 1) % WORDS)[:, None] * d_in + column[None, :], mask=inside, other=0).to(tl.int64)
    state = (((high << 32) | low) >> (lowest % 32)[:, None].to(tl.int64)) & (STATES - 1)
    value = tl.load(book + state)
    at = (segment * ROWS + row)[:, None]
    scale = tl.load(scales + at * groups + (column // width)[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at * d_in + column[None, :], (value * scale).to(out.dtype.element_ty), mask=inside)
