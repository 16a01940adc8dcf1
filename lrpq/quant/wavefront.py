"""Blocks of rows that move each other's targets (quant/row_feedback.py), rounded where all of them are at hand.

Of trellis codes each block is a few columns behind the one before it. A column of a block needs that column's errors in
the blocks before it, and the errors of its own rows in the columns before it. So block b may round w columns as soon as
block b - 1 has: with n blocks and d_in columns that takes d_in + (n - 1) w columns one after the other, where block
after block takes n d_in. A stream is found row by row, which no GPU can hurry, and one block's segments are few: this
is what keeps it busy. Of a small layer one launch on a GPU does all of it; of others w columns are a launch, and what
errors move is made by matrix products.

Scales have to be known before, and can be: those of the targets that nothing has moved yet are as good (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lrpq.kernels.trellis import round_blocks, round_segments
from lrpq.model.layers import Choice
from lrpq.quant.column_loop import sweep
from lrpq.quant.factor import Factor
from lrpq.quant.grid import code_ranges, power_of_two
from lrpq.quant.trellis import SEGMENT_ROWS, codebook, segment_edges
from lrpq.quant.trellis_loop import at_once

if TYPE_CHECKING:
    from jaxtyping import Float, Int8, Int32, Int64

COLUMNS = {"cpu": 32, "cuda": 16}
"""That a block of streams is behind the one before it, where a launch does not take all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """Consecutive rows of which the earlier blocks move the later ones."""

    sizes: Sequence[int]
    """Rows of each block; of streams whole segments, but for the last one."""
    pull: Float[Tensor, "rows rows"] | None
    """How the errors of a row (column) move the target of a row of a later block (row); None: not at all."""


class Rounded(NamedTuple):
    """Columns in the order of the sweep."""

    codes: Int8[Tensor, "d_in rows"]
    targets: Float[Tensor, "d_in rows"]
    """What the rows were rounded to reproduce: as errors of earlier blocks have moved it."""


def round_grid_blocks(
    Tt: Float[Tensor, "d_in rows"],
    factor: Factor,
    S: Float[Tensor, "runs rows"],
    choice: Choice,
    *,
    chunks: Sequence[Blocks],
    on_step: Callable[[], None] = lambda: None,
) -> Rounded:
    """Codes of a uniform grid, block by block; chunks do not see each other. Memory besides: three times the targets,
    and the factor once.

    Args:
        Tt: targets, columns in the order of the sweep, in the factor's dtype.
        factor: of the site.
        S: scales, of every run of columns that share one.
        choice: of all rows.
        chunks: that make up the rows.
        on_step: called whenever a block of each chunk has been rounded.
    """
    codes = torch.empty(Tt.shape, dtype=torch.int8, device=Tt.device)
    bounds, run = code_ranges((choice.bits,), Tt.dtype, Tt.device), len(Tt) // len(S)
    S = S.unsqueeze(1)
    factor = replace(factor, R=factor.R.T.contiguous().T)  # as kernels want it, once

    def rounded(_: int, W: Tensor, at_work: Sequence[tuple[_Place, slice]]) -> Sequence[Tensor]:
        own = [place.rows for place, _columns in at_work]
        targets, scales = (_side_by_side([x[..., rows] for rows in own]) for x in (W, S))
        done = sweep(targets, factor, scales, bounds, run, Z=None)
        sizes = [rows.stop - rows.start for rows in own]
        for rows, found in zip(own, torch.split(done.codes[:, 0], sizes, 1), strict=True):
            codes[:, rows] = found
        return list(torch.split(done.errors[:, 0], sizes, 1))

    return Rounded(codes=codes, targets=_in_turn(Tt, _places(chunks), len(Tt), rounded, on_step))


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), -1)


def round_stream_blocks(
    Tt: Float[Tensor, "d_in rows"],
    factor: Factor,
    S: Float[Tensor, "runs rows"],
    choice: Choice,
    *,
    weights: Float[Tensor, "rows=size"],
    chunks: Sequence[Blocks],
    on_step: Callable[[], None] = lambda: None,
) -> Rounded:
    """Trellis codes, all blocks side by side; chunks do not see each other.

    FLOPs: those of `lrpq.quant.trellis_loop.gptq_trellis`, and rows d_in for every row of a chunk. Memory besides:
    three and a quarter times the targets, and the factor once; in one launch also what blocks move each other by.

    Args:
        Tt: targets, float32, columns in the order of the sweep.
        factor: of the site.
        S: scales, of every run of columns that share one.
        choice: of all rows.
        weights: of the rows, as `lrpq.kernels.trellis.round_segments` takes them.
        chunks: that make up the rows.
        on_step: called about as often as there are blocks; once behind one launch of all.
    """
    d_in, width = len(Tt), COLUMNS[Tt.device.type]
    unit = power_of_two(S.abs().amax())
    wanted, S = Tt / unit, (S / unit).contiguous()
    if wanted.is_cuda and at_once(*wanted.shape):
        done = _streams_at_once(wanted, unit, factor, S, choice, weights, chunks)
        on_step()
        return done
    # of a column that is not rounded yet what the errors of earlier ones add to its target, then its own errors W - Q
    T = torch.zeros_like(wanted)
    upper = factor.R.float().T.contiguous()
    runs = (factor.order // (d_in // len(S))).to(torch.int64)
    codes = torch.empty(T.shape, dtype=torch.int8, device=T.device)
    edges = segment_edges([size for chunk in chunks for size in chunk.sizes], T.device)
    book, places = codebook(choice.bits, T.device), _places(chunks)
    firsts = _firsts(places, d_in, width, T.device)

    def rounded(step: int, W: Tensor, at_work: Sequence[tuple[_Place, slice]]) -> list[Tensor]:
        for place, k in at_work:
            T[k, place.rows] += W[k, place.rows]
        arguments = T, W, S, upper.T, weights, runs, book, codes, edges
        round_segments(*arguments, bits=choice.bits, firsts=firsts[step], most_columns=width)
        for place, k in at_work:
            if k.stop < d_in:
                T[k.stop :, place.rows].addmm_(upper[k.stop :, k], T[k, place.rows])
        return [T[k, place.rows] for place, k in at_work]

    return Rounded(codes=codes, targets=_in_turn(wanted, places, width, rounded, on_step).mul_(unit))


def _streams_at_once(
    W: Tensor, unit: Tensor, factor: Factor, S: Tensor, choice: Choice, weights: Tensor, chunks: Sequence[Blocks]
) -> Rounded:
    codes = torch.empty(W.shape, dtype=torch.int8, device=W.device)
    runs = (factor.order // (len(W) // len(S))).to(torch.int64)
    upper = factor.R.float().T.contiguous()  # what moves a column, side by side
    edges, places = _geometry(tuple((tuple(c.sizes), c.pull is not None) for c in chunks), W.device)
    book, pulls = codebook(choice.bits, W.device), _pulls(chunks, W)
    round_blocks(W, S, upper.T, weights, runs, book, codes, edges, pulls, places, bits=choice.bits)
    return Rounded(codes=codes, targets=W.mul_(unit))


def _pulls(chunks: Sequence[Blocks], like: Tensor) -> Float[Tensor, "pulls=size"]:
    """Of all chunks, each transposed, one after the other; none of a chunk of one block, which nothing moves."""
    squares = [0 if chunk.pull is None else sum(chunk.sizes) ** 2 for chunk in chunks]
    found, start = like.new_empty(sum(squares)), 0
    for chunk, square in zip(chunks, squares, strict=True):
        if chunk.pull is not None:
            found[start : start + square].view(chunk.pull.shape).copy_(chunk.pull.T)
        start += square
    return found


@lru_cache(maxsize=256)
def _geometry(
    chunks: tuple[tuple[tuple[int, ...], bool], ...], device: torch.device
) -> tuple[Int32[Tensor, "edges=size"], Int64[Tensor, "segments 6"]]:
    """Edges and places of segments as ``round_blocks`` takes them, on the device: of blocks of so many rows in every
    chunk, and whether they move each other."""
    found, segment, top, offset = [], 0, 0, 0
    for sizes, move in chunks:
        rows, first, before = sum(sizes), segment, 0
        for size in sizes:
            own = -(-size // SEGMENT_ROWS)
            found += [
                (top, before, first, segment, offset, rows) if move else (top, 0, segment, segment, 0, rows)
            ] * own
            segment, before = segment + own, before + size
        top, offset = top + rows, offset + rows * rows * move
    edges = segment_edges([size for sizes, _ in chunks for size in sizes], device)
    return edges, torch.tensor(found, dtype=torch.int64, device=device)


def _in_turn(
    wanted: Tensor,
    places: Sequence[_Place],
    width: int,
    rounded: Callable[[int, Tensor, Sequence[tuple[_Place, slice]]], Sequence[Tensor]],
    on_step: Callable[[], None],
) -> Float[Tensor, "d_in rows"]:
    """Every block ``width`` columns behind the one before it. Returns what each column was to reproduce when its turn
    came; ``rounded`` gives the errors in that of the columns at work."""
    W, d_in = wanted.clone(), len(wanted)
    num_steps = _num_steps(places, d_in, width)
    seldom = max(1, num_steps // (1 + max(place.behind for place in places)))
    for step in range(num_steps):
        first_of = {place: (step - place.behind) * width for place in places}
        at_work = [(place, slice(k, min(k + width, d_in))) for place, k in first_of.items() if 0 <= k < d_in]
        for (place, k), errors in zip(at_work, rounded(step, W, at_work), strict=True):
            if place.pull is not None:
                W[k, place.later].addmm_(errors - W[k, place.rows] + wanted[k, place.rows], place.pull.T)
        if step % seldom == 0:
            on_step()
    return W


def _num_steps(places: Sequence[_Place], d_in: int, width: int) -> int:
    return -(-d_in // width) + max(place.behind for place in places)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
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
            rows, later = slice(start + top, start + bottom), slice(start + bottom, start + end)
            found.append(_Place(rows=rows, behind=behind, later=later, pull=pull))
            top = bottom
        start += end
    return found


def _firsts(places: Sequence[_Place], d_in: int, width: int, device: torch.device) -> Int32[Tensor, "steps segments"]:
    """First column of each segment in each step; outside of all columns where it rounds none."""
    behind = [place.behind for place in places for _ in segment_edges([place.rows.stop - place.rows.start])[1:]]
    firsts = (torch.arange(_num_steps(places, d_in, width)).unsqueeze(1) - torch.tensor(behind)) * width
    return firsts.to(torch.int32).to(device)
