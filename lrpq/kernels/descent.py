"""Some columns of a sweep of coordinate descent."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lrpq.kernels.compiled import LANES, compiled, in_threads, strips

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int8, Int64
    from numpy.typing import NDArray
    from torch import Tensor

_LARGEST = np.finfo(np.float32).max


def descend_columns(
    G: Float[Tensor, "columns rows"],
    D: Float[Tensor, "columns rows"],
    codes: Int8[Tensor, "columns rows"],
    S: Float[Tensor, "runs rows"],
    bounds: Float[Tensor, "two rows"],
    own: Float[Tensor, "columns columns"],
    inverse: Float[Tensor, "columns=size"],
    runs: Int64[Tensor, "columns=size"],
    moved: Bool[Tensor, "stacked=rows"],
) -> None:
    """Best codes of these columns, one after another; codes, errors and which rows moved are changed in place.

    In memory: G, D, codes and S once. Each row by itself, so cuts and threads change no digit.

    Args:
        G: H D of these columns as it is before them, float32.
        D: their errors T - Q.
        codes: int8.
        S: scales of the runs of columns that share one.
        bounds: smallest and largest code of every row.
        own: their block of H.
        inverse: 1 / H_kk, 0 for a dead input.
        runs: row of S for each column, int64.
        moved: set where a code of a row changed.
    """
    if D.is_cuda:
        from lrpq.kernels import descent_cuda

        descent_cuda.descend_columns(G, D, codes, S, bounds, own, inverse, runs, moved)
        return
    arrays = [x.numpy() for x in (G, D, codes, S, bounds, own.contiguous(), inverse, runs, moved)]

    def work(begin: int, end: int) -> None:
        _descend_columns(begin, end, *arrays)

    in_threads(work, strips(D.shape[1]))


@compiled
def _descend_columns(
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
            # rows by themselves, not indices into all: only then does the compiler make vector code
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
