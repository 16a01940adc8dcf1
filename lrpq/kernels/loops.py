"""The loops that are compiled for CPUs, by numba: all of them, and all they depend on, in this one file.

numba keeps machine code on disk and makes it anew when the file that a loop is in has changed; of constants and options
from other files it takes no notice.

Rows lie side by side in memory and go through a loop as strips of ``LANES``. Rows by themselves (``t = T[k, c,
first:last]``), not indices into all, let the compiler make vector code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import numba
import numpy as np
from numpy.typing import NDArray

_P = ParamSpec("_P")
_R = TypeVar("_R")

FARTHEST = np.float32(2.0**20)
"""In units of its scale, where a trellis's target is cut: codebooks end near 4, and squares must not overflow."""
LANES = 64
"""Rows that go through a loop together, contiguous in memory: a few vector registers of any CPU."""
_LARGEST = np.finfo(np.float32).max


def _compiled(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Machine code for the CPU that it runs on, made at the first call and kept beside the source or in the user's
    cache.

    Products and sums may fuse into one rounding; nothing else is reordered, so that results do not depend on the width
    of the CPU's vectors. The interpreter lock is released.
    """
    options = {"nogil": True, "fastmath": {"contract"}, "error_model": "numpy", "boundscheck": False}
    try:
        made: Callable[_P, _R] = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder that it could be kept in: then every process compiles for itself, in seconds
        made = numba.njit(**options)(function)
    return made


@_compiled
def round_columns(
    begin: int,
    end: int,
    R: NDArray[np.float32],
    T: NDArray[np.float32],
    W: NDArray[np.float32],
    S: NDArray[np.float32],
    bounds: NDArray[np.float32],
    runs: NDArray[np.int64],
    codes: NDArray[np.int8],
) -> None:
    """Columns in the order of the sweep; see `lrpq.kernels.columns.round_columns`."""
    num_columns, _, num_rows = T.shape
    per_choice = -(-num_rows // LANES)
    errors = np.zeros((num_columns, LANES), np.float32)
    target = np.zeros(LANES, np.float32)
    for strip in range(begin, end):
        choice = strip // per_choice
        first = (strip - choice * per_choice) * LANES
        last = min(first + LANES, num_rows)
        low, high = bounds[choice, 0], bounds[choice, 1]
        for k in range(num_columns):
            t, w, s = T[k, choice, first:last], W[k, first:last], S[runs[k], choice, first:last]
            code, error, pull = codes[k, choice, first:last], errors[k], R[k]
            for i in range(len(t)):
                target[i] = t[i]
            fours = k // 4 * 4  # a target is loaded and stored once for four columns
            for j in range(0, fours, 4):
                r0, r1, r2, r3 = pull[j], pull[j + 1], pull[j + 2], pull[j + 3]
                e0, e1, e2, e3 = errors[j], errors[j + 1], errors[j + 2], errors[j + 3]
                for i in range(LANES):
                    target[i] += (e0[i] * r0 + e1[i] * r1) + (e2[i] * r2 + e3[i] * r3)
            for j in range(fours, k):
                r0, e0 = pull[j], errors[j]
                for i in range(LANES):
                    target[i] += e0[i] * r0
            for i in range(len(t)):
                q = min(max(np.rint(target[i] / s[i]), low), high)
                target[i] = q
                error[i] = w[i] - q * s[i]
                t[i] = error[i]
            for i in range(len(t)):
                code[i] = np.int8(target[i])


@_compiled
def descend_columns(
    begin: int,
    end: int,
    G: NDArray[np.float32],
    D: NDArray[np.float32],
    codes: NDArray[np.int8],
    S: NDArray[np.float32],
    bounds: NDArray[np.float32],
    own: NDArray[np.float32],
    inverse: NDArray[np.float32],
    runs: NDArray[np.int64],
    moved: NDArray[np.bool_],
) -> None:
    """See `lrpq.kernels.descent.descend_columns`."""
    num_columns, num_rows = D.shape
    changes = np.zeros((num_columns, LANES), np.float32)
    pull = np.zeros(LANES, np.float32)
    code = np.zeros(LANES, np.float32)
    any_move = np.zeros(LANES, np.float32)
    for strip in range(begin, end):
        first = strip * LANES
        last = min(first + LANES, num_rows)
        low, high, settled = bounds[0, first:last], bounds[1, first:last], moved[first:last]
        any_move[:] = 0.0
        for k in range(num_columns):
            g, d, s, c = G[k, first:last], D[k, first:last], S[runs[k], first:last], codes[k, first:last]
            change, h, scale = changes[k], own[k], inverse[k]
            for i in range(len(g)):
                pull[i] = g[i]
                code[i] = np.float32(c[i])
            fours = k // 4 * 4  # the pull is loaded and stored once for four columns
            for j in range(0, fours, 4):
                h0, h1, h2, h3 = h[j], h[j + 1], h[j + 2], h[j + 3]
                c0, c1, c2, c3 = changes[j], changes[j + 1], changes[j + 2], changes[j + 3]
                for i in range(LANES):
                    pull[i] -= (c0[i] * h0 + c1[i] * h1) + (c2[i] * h2 + c3[i] * h3)
            for j in range(fours, k):
                h0, c0 = h[j], changes[j]
                for i in range(LANES):
                    pull[i] -= c0[i] * h0
            for i in range(len(g)):
                # of tiny scales and inputs: infinity times zero would be no number
                reach = min(max(scale / s[i], -_LARGEST), _LARGEST)
                n = min(max(np.rint(pull[i] * reach), low[i] - code[i]), high[i] - code[i])
                code[i] += n
                any_move[i] += abs(n)
                change[i] = n * s[i]
                d[i] -= change[i]
            for i in range(len(g)):
                c[i] = np.int8(code[i])
        for i in range(len(settled)):
            settled[i] |= any_move[i] > 0


@_compiled
def write_errors(
    begin: int,
    end: int,
    low: np.float32,
    high: np.float32,
    w: NDArray[np.float32],
    importance: NDArray[np.float32],
    inverses: NDArray[np.float32],
    errors: NDArray[np.float32],
) -> None:
    """See `lrpq.kernels.scale_errors.write_errors`."""
    _, width, num_rows = w.shape
    per_group = -(-num_rows // LANES)
    weights = np.zeros((width, LANES), np.float32)
    scale = np.zeros(LANES, np.float32)
    total = np.zeros(LANES, np.float32)
    for strip in range(begin, end):
        group = strip // per_group
        first = (strip - group * per_group) * LANES
        last = min(first + LANES, num_rows)
        v = importance[group, 0]
        for column in range(width):
            weights[column, : last - first] = w[group, column, first:last]
        for t in range(len(inverses)):
            scale[: last - first] = inverses[t, group, 0, first:last]
            total[:] = 0.0
            for column in range(width):
                row, weight = weights[column], v[column]
                for i in range(LANES):
                    x = row[i] * scale[i]
                    d = x - min(max(np.rint(x), low), high)
                    total[i] += weight * (d * d)
            errors[t, group, 0, first:last] = total[: last - first]


@_compiled
def write_fit(
    begin: int,
    end: int,
    low: np.float32,
    high: np.float32,
    w: NDArray[np.float32],
    importance: NDArray[np.float32],
    inverse: NDArray[np.float32],
    product: NDArray[np.float32],
    squares: NDArray[np.float32],
) -> None:
    """See `lrpq.kernels.scale_errors.write_fit`."""
    _, width, num_rows = w.shape
    per_group = -(-num_rows // LANES)
    row = np.zeros(LANES, np.float32)
    scale = np.zeros(LANES, np.float32)
    product_of, squares_of = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    for strip in range(begin, end):
        group = strip // per_group
        first = (strip - group * per_group) * LANES
        last = min(first + LANES, num_rows)
        scale[: last - first] = inverse[group, 0, first:last]
        product_of[:] = 0.0
        squares_of[:] = 0.0
        for column in range(width):
            row[: last - first] = w[group, column, first:last]
            weight = importance[group, 0, column]
            for i in range(LANES):
                q = min(max(np.rint(row[i] * scale[i]), low), high)
                product_of[i] += weight * (row[i] * q)
                squares_of[i] += weight * (q * q)
        product[group, 0, first:last] = product_of[: last - first]
        squares[group, 0, first:last] = squares_of[: last - first]


@_compiled
def round_segments(
    begin: int,
    end: int,
    edge_rows: int,
    bits: int,
    most_columns: int,
    firsts: NDArray[np.int32],
    tops: NDArray[np.int32],
    bottoms: NDArray[np.int32],
    R: NDArray[np.float32],
    T: NDArray[np.float32],
    W: NDArray[np.float32],
    S: NDArray[np.float32],
    weights: NDArray[np.float32],
    runs: NDArray[np.int64],
    book: NDArray[np.float32],
    codes: NDArray[np.int8],
) -> None:
    """Segments begin .. end, of the rows tops .. bottoms, from column ``firsts`` on; see
    `lrpq.kernels.trellis.round_segments`."""
    most_rows = (bottoms - tops).max()
    kept = len(book) >> bits  # histories: states without their oldest symbol
    cost, least = np.zeros(len(book), np.float32), np.zeros(kept, np.float32)
    back = np.zeros((max(most_rows, 2 * edge_rows), kept), np.uint8)
    x, weight = np.zeros(most_rows, np.float32), np.zeros(most_rows, np.float32)
    for segment in range(begin, end):
        first = int(tops[segment])
        rows = int(bottoms[segment]) - first
        edge = min(rows, edge_rows)
        begins = int(firsts[segment])
        for k in range(begins, min(begins + most_columns, len(T))):
            t, w, s, code = T[k, first : first + rows], W[k, first:], S[runs[k], first:], codes[k, first:]
            for j in range(begins, k):
                pull, error = R[k, j], T[j, first : first + rows]
                for i in range(rows):
                    t[i] += pull * error[i]
            for i in range(rows):
                x[i] = min(max(t[i] / s[i], -FARTHEST), FARTHEST)
                weight[i] = weights[first + i] * (s[i] * s[i])
            total = np.float32(0.0)
            for i in range(rows):
                total += weight[i]
            if total > 0:
                for i in range(rows):
                    weight[i] *= rows / total
            # where the end meets the beginning, without a constraint: the history that both agree on
            _walk(x, weight, rows - edge, 2 * edge, rows, -1, bits, book, cost, least, back)
            state = int(np.argmin(cost))
            for i in range(2 * edge - 1, edge - 1, -1):
                state = _before(state, back[i], bits, kept)
            history = state & (kept - 1)
            _walk(x, weight, 0, rows, rows, history, bits, book, cost, least, back)
            state = history
            for other in range(history, len(book), kept):
                if cost[other] < cost[state]:
                    state = other
            for i in range(rows - 1, -1, -1):
                code[i] = np.int8((state & ((1 << bits) - 1)) - (1 << (bits - 1)))
                t[i] = w[i] - book[state] * s[i]
                state = _before(state, back[i], bits, kept)


@_compiled
def _before(state: int, back: NDArray[np.uint8], bits: int, kept: int) -> int:
    """The state of the row above: what the state holds of it, and its oldest symbol as noted."""
    shared = state >> bits
    return shared + kept * int(back[shared])


@_compiled
def _walk(
    x: NDArray[np.float32],
    weight: NDArray[np.float32],
    start: int,
    steps: int,
    rows: int,
    history: int,
    bits: int,
    book: NDArray[np.float32],
    cost: NDArray[np.float32],
    least: NDArray[np.float32],
    back: NDArray[np.uint8],
) -> None:
    """Viterbi's algorithm down a segment from row ``start``, around its end: the least cost of every state, and of
    every history the symbol that leaves it. Non-negative floats compare as their bits do, so the symbol is noted in the
    last bits of the cost."""
    kept, symbols = len(least), 1 << bits
    costs, leasts = cost.view(np.int32), least.view(np.int32)
    symbol_of = np.int32(symbols - 1)
    without = np.int32(~symbol_of)
    cost[:] = 0.0
    for i in range(steps):
        row = (start + i) % rows
        if i == 0 and history >= 0:
            least[:] = np.float32(1e30)
            least[history] = 0.0
        else:
            part = costs[:kept]
            for p in range(kept):
                leasts[p] = part[p] & without
            for symbol in range(1, symbols):
                part = costs[symbol * kept : (symbol + 1) * kept]
                noted = np.int32(symbol)
                for p in range(kept):
                    leasts[p] = min(leasts[p], (part[p] & without) | noted)
            noted_in = back[i]
            for p in range(kept):
                noted_in[p] = np.uint8(leasts[p] & symbol_of)
                leasts[p] &= without
        here, by = x[row], weight[row]
        # few symbols make loops too short for vectors: what histories cost is spread over their states first, in loops
        # of constant length, and the rest is one long loop
        if bits == 2:
            for p in range(kept):
                for b in range(4):
                    cost[4 * p + b] = least[p]
        elif bits == 3:
            for p in range(kept):
                for b in range(8):
                    cost[8 * p + b] = least[p]
        if bits <= 3:
            for state in range(len(book)):
                d = here - book[state]
                cost[state] += by * (d * d)
        else:
            for p in range(kept):
                so_far = least[p]
                values, costs_of = book[p * symbols : (p + 1) * symbols], cost[p * symbols : (p + 1) * symbols]
                for b in range(symbols):
                    d = here - values[b]
                    costs_of[b] = so_far + by * (d * d)
