"""Upper triangles of square matrices as they travel between workers: rows from the diagonal on, a strip at a time.

Sums of products of inputs with themselves are symmetric: only their upper triangles are added up, stored and read
(lrpq.quant.hessian.mirror, tasks.store.symmetric), and those of one block of a 70B model are 5 GB as squares.
"""

from __future__ import annotations

from collections import deque
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tasks.store.host_threads import in_order

if TYPE_CHECKING:
    from jaxtyping import Float

STRIP = 512
"""Rows of a strip, which begins with the first one's diagonal: 2% more than the triangle at a width of 28,672."""


class Band(NamedTuple):
    """Some of the strips: of ``total`` places that have nearly as many values each, ``start`` to ``stop - 1``.

    Three bands at places 0 to 2, 3 and 4 of 5 have all strips together, and three fifths of the values and one fifth
    each.
    """

    start: int
    stop: int
    total: int

    @property
    def places(self) -> range:
        """Places whose strips are in it."""
        return range(self.start, self.stop)

    def has(self, strip: int) -> bool:
        """Whether a strip is in it: strips are dealt out forth and back, as each is shorter than the one before."""
        place = strip % (2 * self.total)
        return min(place, 2 * self.total - 1 - place) in self.places

    def has_row(self, row: int) -> bool:
        """Whether the strip of a row is in it."""
        return self.has(row // STRIP)


WHOLE = Band(0, 1, 1)


def packed(matrix: Float[Tensor, "d d"], band: Band = WHOLE) -> Float[Tensor, " packed"]:
    """The strips of a band one after the other, on the matrix's device; a copy."""
    strips = _strips(len(matrix), band)
    return torch.cat([matrix.new_empty(0), *(matrix[rows, rows.start :].reshape(-1) for rows in strips)])


def unpacked(values: Float[Tensor, " packed"]) -> Float[Tensor, "d d"]:
    """The matrix of all strips, on the device of ``values``, with zeros below them."""
    width = _width(values.numel())
    matrix = zeros(width, values)
    start = 0
    calls = []
    for rows in _strips(width):
        above = matrix[rows, rows.start :]
        calls.append(partial(above.copy_, values[start : start + above.numel()].view(above.shape)))
        start += above.numel()
    if matrix.device.type == "cpu":
        with closing(in_order(calls)) as copies:
            deque(copies, maxlen=0)
    else:
        deque((call() for call in calls), maxlen=0)
    return matrix


class UpperTriangle:
    """A matrix of which ``values`` are the packed strips, or those of a band, read part by part where it lies.

    Raises:
        ValueError: they are no upper triangle.
    """

    def __init__(self, values: Float[Tensor, " packed"], band: Band = WHOLE) -> None:
        self.width = _width(values.numel(), band)
        self.dtype = values.dtype
        strips = _strips(self.width, band)
        sizes = [(rows.stop - rows.start, self.width - rows.start) for rows in strips]
        flat = values.split([height * length for height, length in sizes])
        self._strips = {
            rows.start // STRIP: strip.view(size) for rows, strip, size in zip(strips, flat, sizes, strict=True)
        }

    def part(self, rows: slice, columns: slice) -> Float[Tensor, "rows columns"]:
        """Some rows of one strip in some columns from its diagonal on, as a view."""
        strip = self._strips[rows.start // STRIP]
        first = rows.start // STRIP * STRIP
        return strip[rows.start - first : rows.stop - first, columns.start - first : columns.stop - first]


class Sum(UpperTriangle):
    """Two of them added up part by part as they are read, in no pass over memory of its own; bits are those of adding
    the values, as every one is the same addition.

    Raises:
        ValueError: they are of different widths or dtypes.
    """

    def __init__(self, left: UpperTriangle, right: UpperTriangle) -> None:
        if (left.width, left.dtype) != (right.width, right.dtype):
            raise ValueError(f"{left.dtype} {left.width} wide and {right.dtype} {right.width} wide have no sum")
        self.width, self.dtype = left.width, left.dtype
        self._addends = left, right

    def part(self, rows: slice, columns: slice) -> Float[Tensor, "rows columns"]:
        """The same of the sum, in new memory."""
        left, right = self._addends
        return left.part(rows, columns) + right.part(rows, columns)


def zeros(width: int, like: Tensor) -> Float[Tensor, "d d"]:
    """Zeros of the dtype and on the device of a tensor; in host memory pages that nobody touches are none."""
    if like.device.type != "cpu":
        return like.new_zeros(width, width)
    return torch.from_numpy(np.zeros((width, width), dtype=str(like.dtype).removeprefix("torch.")))


def _strips(width: int, band: Band = WHOLE) -> list[slice]:
    starts = (start for start in range(0, width, STRIP) if band.has_row(start))
    return [slice(start, min(start + STRIP, width)) for start in starts]


def _numel(width: int, band: Band = WHOLE) -> int:
    return sum((rows.stop - rows.start) * (width - rows.start) for rows in _strips(width, band))


def _width(numel: int, band: Band = WHOLE) -> int:
    """Of the matrix of so many packed values: the wider it is, the more it has, from a band's first strip on.

    Raises:
        ValueError: there is none.
    """
    low, high = 0, STRIP
    while _numel(high, band) < numel:
        low, high = high, 2 * high
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if _numel(middle, band) < numel else (low, middle)
    if _numel(low, band) != numel or not numel:
        raise ValueError(f"{numel} values are no upper triangle in strips of {STRIP} rows")
    return low
