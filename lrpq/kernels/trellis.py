"""Some columns of a sweep whose codes are trellis codes (quant/trellis.py): Viterbi's algorithm down each of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lrpq.kernels import loops
from lrpq.kernels.threads import in_threads

if TYPE_CHECKING:
    from jaxtyping import Float, Int8, Int32, Int64
    from torch import Tensor

EDGE_ROWS = 16
"""Rows on either side of where a segment's end meets its beginning, from which the history at that place is found."""


def round_segments(
    T: Float[Tensor, "columns rows"],
    W: Float[Tensor, "columns rows"],
    S: Float[Tensor, "runs rows"],
    R: Float[Tensor, "columns columns"],
    weights: Float[Tensor, "rows=size"],
    runs: Int64[Tensor, "columns=size"],
    book: Float[Tensor, "states=size"],
    codes: Int8[Tensor, "columns rows"],
    edges: Int32[Tensor, "edges=size"],
    *,
    bits: int,
    firsts: Int32[Tensor, "segments=size"] | None = None,
    most_columns: int | None = None,
) -> None:
    """Codes of these columns and, in place of their targets in T, their errors W - Q; of some of them where ``firsts``
    says which.

    Of a segment's codes those with the least sum of weights times squared errors, among all whose end and beginning
    meet in the history that the rows around that place prefer on their own. 4,096 states are four operations each:
    2^14 FLOPs a row and column, times 1 + 2 EDGE_ROWS / 128 with segments of 128. Each segment by itself, so threads
    change no digit.

    Args:
        T: targets as all columns before these have corrected them, float32, contiguous; changed.
        W: what errors are taken from, columns in the order of the sweep, contiguous.
        S: scales of the runs of columns that share one, contiguous.
        R: how the error of an earlier column (row) moves the target of a later one (column).
        weights: of the rows, non-negative: a segment's rows share its errors out by them.
        runs: row of S for each column.
        book: value of each state.
        codes: written, int8: symbols less 2^(bits - 1).
        edges: first row of each segment, and the number of rows; none has more than 128.
        bits: of a symbol.
        firsts: first column of each segment, which may be at columns of its own; a negative one, or one beyond the last
            column, is none.
        most_columns: of a segment from its first one on; by default all that follow.
    """
    most_columns = len(T) if most_columns is None else most_columns
    if firsts is None:
        firsts = torch.zeros(len(edges) - 1, dtype=torch.int32, device=T.device)
    if T.is_cuda:
        from lrpq.kernels import trellis_cuda

        arguments = T, W, S, R, weights, runs, book, codes, edges, firsts
        trellis_cuda.round_segments(*arguments, most_columns=most_columns, bits=bits, edge_rows=EDGE_ROWS)
        return
    at_work = ((firsts >= 0) & (firsts < len(T))).nonzero().squeeze(1)
    of_segments = [x[at_work] for x in (firsts, edges[:-1], edges[1:])]
    arrays = [x.numpy() for x in (*of_segments, R.T.contiguous(), T, W, S, weights, runs, book, codes)]

    def work(begin: int, end: int) -> None:
        loops.round_segments(begin, end, EDGE_ROWS, bits, most_columns, *arrays)

    if len(at_work):
        in_threads(work, len(at_work))


def round_blocks(
    W: Float[Tensor, "columns rows"],
    S: Float[Tensor, "runs rows"],
    R: Float[Tensor, "columns columns"],
    weights: Float[Tensor, "rows=size"],
    runs: Int64[Tensor, "columns=size"],
    book: Float[Tensor, "states=size"],
    codes: Int8[Tensor, "columns rows"],
    edges: Int32[Tensor, "edges=size"],
    pulls: Float[Tensor, "pulls=size"],
    places: Int64[Tensor, "segments 6"],
    *,
    bits: int,
) -> None:
    """Codes of all columns of segments that move each other's targets, in one launch: for CUDA devices.

    Sixteen columns of a segment wait for those of the segments that move it. FLOPs besides those of ``round_segments``:
    two a row and column for every earlier column, and for every row that moves it.

    Args:
        W: targets, float32, contiguous; in their place what each was when its turn came.
        S: as for ``round_segments``, as are R, weights, runs, book, codes, edges and bits.
        R: how the error of an earlier column (row) moves the target of a later one (column).
        weights: of the rows.
        runs: row of S for each column.
        book: value of each state.
        codes: written.
        edges: first row of each segment, and the number of rows.
        pulls: of each chunk of rows, one after the other, how what became of a row (row) moves the target of another
            (column).
        places: of each segment: its chunk's first row; how many rows of the chunk come before its block; the first
            segment of those and the one behind the last; where in ``pulls`` its chunk begins; the chunk's rows.
        bits: of a symbol.
    """
    from lrpq.kernels import trellis_cuda

    arguments = W, S, R, weights, runs, book, codes, edges, pulls, places
    trellis_cuda.round_blocks(*arguments, bits=bits, edge_rows=EDGE_ROWS)
