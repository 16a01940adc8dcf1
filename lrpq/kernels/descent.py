"""Some columns of a sweep of coordinate descent."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lrpq.kernels import loops
from lrpq.kernels.columns import write_halves
from lrpq.kernels.threads import in_threads, strips

if TYPE_CHECKING:
    from jaxtyping import BFloat16, Bool, Float, Int8, Int64
    from torch import Tensor


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
    halves: BFloat16[Tensor, "columns three rows"] | None = None,
) -> None:
    """Best codes of these columns, one after another; codes, errors and which rows moved are changed in place.

    In memory: G, D, codes and S once. Each row by itself, so cuts and threads change no digit.

    Args:
        G: H D of these columns as it is before them, float32; what it holds afterwards is of no use.
        D: their errors T - Q.
        codes: int8.
        S: scales of the runs of columns that share one.
        bounds: smallest and largest code of every row.
        own: their block of H.
        inverse: 1 / H_kk, 0 for a dead input.
        runs: row of S for each column, int64.
        moved: set where a code of a row changed.
        halves: written where given, contiguous: of every error its leading digits, what these leave, and the leading
            ones again (quant/halves.py).
    """
    if D.is_cuda:
        from lrpq.kernels import descent_cuda

        descent_cuda.descend_columns(G, D, codes, S, bounds, own, inverse, runs, moved, halves)
        return
    arrays = [x.numpy() for x in (G, D, codes, S, bounds, own.contiguous(), inverse, runs, moved)]

    def work(begin: int, end: int) -> None:
        loops.descend_columns(begin, end, *arrays)

    in_threads(work, strips(D.shape[1]))
    if halves is not None:
        write_halves(halves, D)
