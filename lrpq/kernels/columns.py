"""Some columns of GPTQ's sweep: rounded one after another, each correcting those after it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lrpq.kernels.compiled import LANES, compiled, in_threads, strips

if TYPE_CHECKING:
    from jaxtyping import Float, Int8, Int64
    from numpy.typing import NDArray
    from torch import Tensor


def round_columns(
    T: Float[Tensor, "columns choices rows"],
    W: Float[Tensor, "columns rows"],
    S: Float[Tensor, "runs choices rows"],
    R: Float[Tensor, "columns columns"],
    bounds: Float[Tensor, "choices two"],
    runs: Int64[Tensor, "columns=size"],
    codes: Int8[Tensor, "columns choices rows"],
) -> None:
    """Codes of these columns and, in place of their targets in T, their errors W - Q.

    In memory: T, W, S and codes once. Each row by itself, so cuts and threads change no digit.

    Args:
        T: targets as all columns before these have corrected them, float32, contiguous; changed.
        W: the weights, columns in the order of the sweep.
        S: scales of the runs of columns that share one.
        R: their block of the factor, unit diagonal.
        bounds: smallest and largest code of every choice.
        runs: row of S for each column, int64.
        codes: written, int8.
    """
    if T.is_cuda:
        from lrpq.kernels import columns_cuda

        columns_cuda.round_columns(T, W, S, R, bounds, runs, codes)
        return
    upper = R.T.contiguous().numpy()
    arrays = [x.numpy() for x in (T, W, S, bounds, runs, codes)]

    def work(begin: int, end: int) -> None:
        _round_columns(begin, end, upper, *arrays)

    in_threads(work, T.shape[1] * strips(T.shape[2]))


@compiled
def _round_columns(
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
            # rows by themselves, not indices into all: only then does the compiler make vector code
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
