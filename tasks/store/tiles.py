"""Tiles of a matrix's upper triangle, out of it and into it: a run of tiles of one row at a time.

Threads that move bytes share the interpreter. A tile by itself is a handful of calls that each give the interpreter up
and wait for it again: of 60 tiles of a Hessian, twelve threads were no faster than two (docs/log.md). The full tiles
of one row are one copy instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from tasks.upper_triangle import Triangle

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy.typing import NDArray

TILE = 256
_BELOW = np.tri(TILE, k=-1, dtype=bool)

Position = tuple[int, int]
"""Row and column of a tile."""


def gather(
    matrix: Float[Tensor, "d d"] | Triangle, width: int, positions: Sequence[Position], tiles: NDArray[np.float32]
) -> None:
    """Copy tiles of a matrix, of any device; edge tiles and the lower half of those on the diagonal get zeros.

    Args:
        matrix: of which only the upper triangle is looked at.
        width: of the matrix.
        positions: of the tiles, those of a row one after the other.
        tiles: where to, [tiles, TILE, TILE].
    """
    for start, stop in _runs(positions):
        (row, first), count = positions[start], stop - start
        rows = slice(row * TILE, min(width, (row + 1) * TILE))
        full = count if (first + count) * TILE <= width else count - 1
        if full:
            columns = slice(first * TILE, (first + full) * TILE)
            _read(matrix, rows, columns, tiles[start : start + full].transpose(1, 0, 2))
        if full < count:
            edge = tiles[stop - 1]
            edge[:] = 0.0
            columns = slice((first + full) * TILE, width)
            _read(matrix, rows, columns, edge[: rows.stop - rows.start, : width - columns.start])
        if first == row:
            tiles[start][_BELOW] = 0.0


def scatter(
    tiles: NDArray[np.float32], positions: Sequence[Position], matrix: NDArray[np.float32], *, lower: bool
) -> None:
    """Put tiles in their places; with ``lower`` also what they are mirrored, so that the matrix is symmetric.

    Args:
        tiles: [tiles, TILE, TILE].
        positions: of the tiles, those of a row one after the other.
        matrix: [d, d], contiguous; below a tile on the diagonal it is given zeros.
        lower: whether the triangle below the diagonal is wanted.
    """
    width = len(matrix)
    for start, stop in _runs(positions):
        (row, first), count = positions[start], stop - start
        rows = slice(row * TILE, min(width, (row + 1) * TILE))
        height = rows.stop - rows.start
        if lower and first == row:
            square = tiles[start][:height, :height].copy()
            below = _BELOW[:height, :height]
            square[below] = square.T[below]  # copied, not added: adding would turn -0.0 into 0.0
            matrix[rows, rows] = square
            start, first, count = start + 1, first + 1, count - 1
        if not count:
            continue
        full = count if (first + count) * TILE <= width else count - 1
        if full:
            run, columns = tiles[start : start + full], slice(first * TILE, (first + full) * TILE)
            matrix[rows, columns].reshape(height, full, TILE)[:] = run.transpose(1, 0, 2)
            if lower:
                matrix[columns, rows].reshape(full, TILE, height)[:] = run.transpose(0, 2, 1)
        if full < count:
            columns = slice((first + full) * TILE, width)
            edge = tiles[stop - 1][:height, : width - columns.start]
            matrix[rows, columns] = edge
            if lower:
                matrix[columns, rows] = edge.T


def _runs(positions: Sequence[Position]) -> Iterator[tuple[int, int]]:
    """Start and stop of tiles that lie beside each other."""
    breaks = [i for i, (a, b) in enumerate(pairwise(positions), 1) if (a[0], a[1] + 1) != b]
    return pairwise((0, *breaks, len(positions)))


def _read(matrix: Tensor | Triangle, rows: slice, columns: slice, out: NDArray[np.float32]) -> None:
    """``out`` is [rows, columns], or its columns in pieces."""
    if isinstance(matrix, Triangle):
        matrix.read(rows, columns, out)
    else:
        np.copyto(out, matrix[rows, columns].detach().cpu().numpy().reshape(out.shape))
