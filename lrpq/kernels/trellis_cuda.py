"""Columns of a sweep with trellis codes, for CUDA devices, in Triton: a program a segment of rows, all columns of a
call."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from lrpq.kernels.loops import FARTHEST
from lrpq.kernels.threads import on_device_of

if TYPE_CHECKING:
    from torch import Tensor

_WARPS = {2: 4, 3: 4, 4: 2, 5: 2, 6: 2}
"""By width: the fastest of 2, 4, 8 and 16 on an H200. More warps wait for each other more: .45, 1.1 and 2.5 s a 10,000
columns at 3 bits with 4, 8 and 16 of them (docs/log.md)."""
_ROWS = 128
"""Of a segment, at most."""


def round_segments(
    T: Tensor,
    W: Tensor,
    S: Tensor,
    R: Tensor,
    weights: Tensor,
    runs: Tensor,
    book: Tensor,
    codes: Tensor,
    edges: Tensor,
    firsts: Tensor,
    *,
    most_columns: int,
    bits: int,
    edge_rows: int,
) -> None:
    """See `lrpq.kernels.trellis.round_segments`."""
    num_columns, rows = T.shape
    segments = len(edges) - 1
    kept = len(book) >> bits
    back = torch.empty(segments, _ROWS, kept, dtype=torch.uint8, device=T.device)
    x, weight = (torch.empty(segments, _ROWS, device=T.device) for _ in range(2))
    found = torch.empty(segments, _ROWS, dtype=torch.int32, device=T.device)
    with on_device_of(T):
        _round_segments[(segments,)](
            T, W, S, R, weights, runs, book, codes, edges, firsts, back, x, weight, found,
            num_columns, most_columns, rows, R.stride(0), R.stride(1),
            BITS=bits, SYMBOLS=1 << bits, KEPT=kept, ROWS=_ROWS, EDGE=edge_rows, FARTHEST=float(FARTHEST),
            num_warps=_WARPS[bits],
        )  # fmt: skip


@triton.jit
def _round_segments(
    T, W, S, R, weights, runs, book, codes, edges, firsts, back, x, weight, found,
    num_columns, most_columns, rows, R_row, R_column,
    BITS: tl.constexpr, SYMBOLS: tl.constexpr, KEPT: tl.constexpr, ROWS: tl.constexpr, EDGE: tl.constexpr,
    FARTHEST: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0)
    first = tl.load(edges + segment)
    here = tl.load(edges + segment + 1) - first
    edge = tl.minimum(here, EDGE)
    row = tl.arange(0, ROWS)
    valid = row < here
    own = first + tl.minimum(row, here - 1)
    back += segment * ROWS * KEPT
    x += segment * ROWS
    weight += segment * ROWS
    found += segment * ROWS
    history = tl.arange(0, KEPT)
    values = tl.load(book + history[:, None] * SYMBOLS + tl.arange(0, SYMBOLS)[None, :])
    row_weights = tl.load(weights + own, mask=valid, other=0.0)
    begin = tl.load(firsts + segment)
    end = tl.where(begin < 0, begin, tl.minimum(begin + most_columns, num_columns))
    for k in range(begin, end):
        column = tl.cast(k, tl.int64)
        place = column * rows + own
        run = tl.load(runs + k).to(tl.int32)
        s = tl.load(S + run * rows + own)
        t = tl.load(T + place)
        for j in range(begin, k):
            before = tl.cast(j, tl.int64)
            t += tl.load(R + before * R_row + column * R_column) * tl.load(T + before * rows + own)
        by = row_weights * s * s
        total = tl.sum(by, axis=0)
        by = by * tl.where(total > 0, here / total, 1.0)
        tl.store(x + row, tl.minimum(tl.maximum(t / s, -FARTHEST), FARTHEST))
        tl.store(weight + row, by)
        tl.debug_barrier()
        cost = _walk(x, weight, here - edge, 2 * edge, here, -1, values, back, history, SYMBOLS, KEPT)
        state = _least(cost, history, SYMBOLS, KEPT)
        tl.debug_barrier()  # what leaves each history was noted by all threads
        for i in range(edge):
            state = _before(state, back + (2 * edge - 1 - i) * KEPT, BITS, KEPT)
        meet = state & (KEPT - 1)
        tl.debug_barrier()
        cost = _walk(x, weight, 0, here, here, meet, values, back, history, SYMBOLS, KEPT)
        cost = tl.where((history == meet)[None, :], cost, 1e31)
        state = _least(cost, history, SYMBOLS, KEPT)
        tl.debug_barrier()
        for i in range(here):
            at = here - 1 - i
            tl.store(found + at, state)
            state = _before(state, back + at * KEPT, BITS, KEPT)
        tl.debug_barrier()
        states = tl.load(found + row, mask=valid, other=0)
        value = tl.load(book + states)
        w = tl.load(W + place)
        tl.store(T + place, w - value * s, mask=valid)
        tl.store(codes + place, ((states & (SYMBOLS - 1)) - SYMBOLS // 2).to(tl.int8), mask=valid)
        tl.debug_barrier()  # the next column reads errors that other threads have written


@triton.jit
def _least(cost, history, SYMBOLS: tl.constexpr, KEPT: tl.constexpr):
    """The first of the states of least cost. Not by argmin of the costs in one row, which on an H200 finds others."""
    state = tl.arange(0, SYMBOLS)[:, None] * KEPT + history[None, :]
    least = tl.min(tl.min(cost, axis=0), axis=0)
    return tl.min(tl.min(tl.where(cost == least, state, SYMBOLS * KEPT), axis=0), axis=0)


@triton.jit
def _before(state, back, BITS: tl.constexpr, KEPT: tl.constexpr):
    """The state of the row above: what the state holds of it, and its oldest symbol as noted."""
    shared = state >> BITS
    return shared + KEPT * tl.load(back + shared).to(tl.int32)


@triton.jit
def _walk(x, weight, start, steps, rows, meet, values, back, history, SYMBOLS: tl.constexpr, KEPT: tl.constexpr):
    """See `lrpq.kernels.loops._walk`; costs are [oldest symbol, rest of the state]."""
    symbol = tl.arange(0, SYMBOLS)
    without: tl.constexpr = -SYMBOLS
    cost = tl.zeros([SYMBOLS, KEPT], tl.float32)
    at = start % rows
    here, by = tl.load(x + at), tl.load(weight + at)
    for i in range(steps):
        after = (start + i + 1) % rows
        next_here, next_by = tl.load(x + after), tl.load(weight + after)
        noted = (cost.to(tl.int32, bitcast=True) & without) | symbol[:, None]
        least = tl.min(noted, axis=0)
        tl.store(back + i * KEPT + history, (least & (SYMBOLS - 1)).to(tl.uint8))
        so_far = (least & without).to(tl.float32, bitcast=True)
        begins = (i == 0) & (meet >= 0)
        so_far = tl.where(begins, tl.where(history == meet, 0.0, 1e30), so_far)
        d = here - values
        cost = tl.reshape(so_far[:, None] + by * (d * d), (SYMBOLS, KEPT))
        here, by = next_here, next_by
    return cost
