"""Blocks of rows with trellis codes, rounded side by side: each is a few columns behind the one before it.

A column of a block (quant/row_feedback.py) needs that column's errors in the blocks before it, and the errors of its own
rows in the columns before it. So block b may round columns j .. j + w as soon as block b - 1 has: with n blocks and d_in
columns that takes d_in + (n - 1) w columns one after the other, where block after block takes n d_in. A stream is found
row by row, which no GPU can hurry, and one block's segments are few: this is what keeps it busy. Scales have to be known
before, and can be: those of the targets that nothing has moved yet are as good (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lrpq.kernels.trellis import round_segments
from lrpq.model.layers import Choice
from lrpq.quant.factor import Factor
from lrpq.quant.grid import power_of_two
from lrpq.quant.trellis import codebook, segment_edges

if TYPE_CHECKING:
    from jaxtyping import Float, Int8, Int32

COLUMNS = {"cpu": 32, "cuda": 16}
"""That a block is behind the one before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """Consecutive rows of which the earlier blocks move the later ones."""

    sizes: Sequence[int]
    """Rows of each block, whole segments but for the last one."""
    pull: Float[Tensor, "rows rows"] | None
    """How the errors of a row (column) move the target of a row of a later block (row); None: not at all."""


class Rounded(NamedTuple):
    """Columns in the order of the sweep."""

    codes: Int8[Tensor, "d_in rows"]
    targets: Float[Tensor, "d_in rows"]
    """What the rows were rounded to reproduce: as errors of earlier blocks have moved it."""


def round_blocks(
    Tt: Float[Tensor, "d_in rows"],
    factor: Factor,
    S: Float[Tensor, "runs rows"],
    choice: Choice,
    weights: Float[Tensor, "rows=size"],
    chunks: Sequence[Blocks],
    *,
    on_step: Callable[[], None] = lambda: None,
) -> Rounded:
    """Codes of rows that lie one chunk after the other; chunks do not see each other.

    FLOPs: those of `lrpq.quant.trellis_loop.gptq_trellis`, and rows d_in for every row of a chunk. Memory: four times
    the targets.

    Args:
        Tt: targets, float32, columns in the order of the sweep.
        factor: of the site.
        S: scales, of every run of columns that share one.
        choice: of all rows.
        weights: of the rows, as `lrpq.kernels.trellis.round_segments` takes them.
        chunks: that make up the rows.
        on_step: called whenever columns have been rounded.
    """
    d_in, width = len(Tt), COLUMNS[Tt.device.type]
    unit = power_of_two(S.abs().amax())
    wanted, S = Tt / unit, (S / unit).contiguous()
    W = wanted.clone()
    # of a column that is not rounded yet what the errors of earlier ones add to its target, then its own errors W - Q
    T = torch.zeros_like(W)
    upper = factor.R.float().T.contiguous()
    runs = (factor.order // (d_in // len(S))).to(torch.int64)
    codes = torch.empty(W.shape, dtype=torch.int8, device=W.device)
    edges = segment_edges([size for chunk in chunks for size in chunk.sizes], W.device)
    book, places = codebook(choice.bits, W.device), _places(chunks)
    for step, firsts in enumerate(_firsts(places, d_in, width, W.device)):
        first_of = {place: (step - place.behind) * width for place in places}
        at_work = [(place, slice(k, min(k + width, d_in))) for place, k in first_of.items() if 0 <= k < d_in]
        for place, k in at_work:
            T[k, place.rows] += W[k, place.rows]
        round_segments(
            T, W, S, upper.T, weights, runs, book, codes, edges, firsts=firsts, most_columns=width, bits=choice.bits
        )
        for place, k in at_work:
            errors = T[k, place.rows]
            if k.stop < d_in:
                T[k.stop :, place.rows].addmm_(upper[k.stop :, k], errors)
            if place.pull is not None:
                lost = errors - W[k, place.rows] + wanted[k, place.rows]
                W[k, place.later].addmm_(lost, place.pull.T)
        on_step()
    return Rounded(codes=codes, targets=W.mul_(unit))


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    """A block among all rows."""

    rows: slice
    behind: int
    """How many blocks of its chunk come before it."""
    later: slice
    """Rows of the blocks of its chunk that come after it."""
    pull: Tensor | None
    """How its errors move those; None where there are none, or nothing is moved."""


def _places(chunks: Sequence[Blocks]) -> list[_Place]:
    found, start = [], 0
    for chunk in chunks:
        end, top = sum(chunk.sizes), 0
        for behind, size in enumerate(chunk.sizes):
            bottom = top + size
            pull = None if chunk.pull is None or bottom == end else chunk.pull[bottom:, top:bottom]
            found.append(_Place(slice(start + top, start + bottom), behind, slice(start + bottom, start + end), pull))
            top = bottom
        start += end
    return found


def _firsts(places: Sequence[_Place], d_in: int, width: int, device: torch.device) -> Int32[Tensor, "steps segments"]:
    """First column of each segment in each step; outside of all columns where it rounds none."""
    behind = [place.behind for place in places for _ in segment_edges([place.rows.stop - place.rows.start])[1:]]
    steps = -(-d_in // width) + max(behind)
    firsts = (torch.arange(steps).unsqueeze(1) - torch.tensor(behind)) * width
    return firsts.to(torch.int32).to(device)
