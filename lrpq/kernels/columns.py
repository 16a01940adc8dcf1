"""Some columns of GPTQ's sweep: rounded one after another, each correcting those after it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lrpq.kernels import loops
from lrpq.kernels.threads import in_threads, strips

if TYPE_CHECKING:
    from jaxtyping import BFloat16, Float, Int8, Int64
    from torch import Tensor


def round_columns(
    T: Float[Tensor, "columns choices rows"],
    W: Float[Tensor, "columns rows"],
    S: Float[Tensor, "runs choices rows"],
    R: Float[Tensor, "columns columns"],
    bounds: Float[Tensor, "choices two"],
    runs: Int64[Tensor, "columns=size"],
    codes: Int8[Tensor, "columns choices rows"],
    halves: BFloat16[Tensor, "columns three choices rows"] | None = None,
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
        halves: written where given, contiguous: of every error its leading digits, what these leave, and the leading
            ones again (quant/halves.py).
    """
    if T.is_cuda:
        from lrpq.kernels import columns_cuda

        columns_cuda.round_columns(T, W, S, R, bounds, runs, codes, halves)
        return
    upper = R.T.contiguous().numpy()
    arrays = [x.numpy() for x in (T, W, S, bounds, runs, codes)]

    def work(begin: int, end: int) -> None:
        loops.round_columns(begin, end, upper, *arrays)

    in_threads(work, T.shape[1] * strips(T.shape[2]))
    if halves is not None:
        write_halves(halves, T)


def write_halves(halves: BFloat16[Tensor, "columns three *rows"], errors: Float[Tensor, columns * rows]) -> None:
    """Of every error its leading digits, what these leave, and the leading ones again."""
    halves[:, 0] = halves[:, 2] = errors
    torch.sub(errors, halves[:, 0], out=halves[:, 1])
