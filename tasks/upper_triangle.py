"""Upper triangles of square matrices as they travel between workers: rows from the diagonal on, a strip at a time.

Sums of products of inputs with themselves are symmetric: only their upper triangles are added up, stored and read
(lrpq.quant.hessian.mirror, tasks.store.symmetric), and those of one block of a 70B model are 5 GB as squares.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tasks.store.host_threads import in_order

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy.typing import NDArray

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


class Triangle(ABC):
    """The upper triangle of a matrix, read part by part: some rows of one strip, in columns from its diagonal on.

    What a part goes to is [rows, columns], or has the columns in equal pieces, [rows, pieces, columns of a piece].
    """

    width: int
    dtype: torch.dtype
    band: Band

    @abstractmethod
    def read(self, rows: slice, columns: slice, out: NDArray[np.float32]) -> None:
        """Copy a part."""

    @abstractmethod
    def add_to(self, rows: slice, columns: slice, out: NDArray[np.float32]) -> None:
        """Add a part."""


class UpperTriangle(Triangle):
    """A matrix of which ``values`` are the packed strips, or those of a band.

    Raises:
        ValueError: they are no upper triangle.
    """

    def __init__(self, values: Float[Tensor, " packed"], band: Band = WHOLE) -> None:
        self.width = _width(values.numel(), band)
        self.dtype, self.band = values.dtype, band
        strips = _strips(self.width, band)
        sizes = [(rows.stop - rows.start, self.width - rows.start) for rows in strips]
        flat = values.split([height * length for height, length in sizes])
        self._strips = {
            rows.start // STRIP: strip.view(size) for rows, strip, size in zip(strips, flat, sizes, strict=True)
        }

    def read(self, rows: slice, columns: slice, out: NDArray[np.float32]) -> None:
        """Copy a part."""
        np.copyto(out, self._part(rows, columns, out))

    def add_to(self, rows: slice, columns: slice, out: NDArray[np.float32]) -> None:
        """Add a part."""
        np.add(out, self._part(rows, columns, out), out=out)

    def _part(self, rows: slice, columns: slice, out: NDArray[np.float32]) -> NDArray[np.float32]:
        """A view in the shape of ``out`` where the strips are in host memory."""
        strip = self._strips[rows.start // STRIP]
        first = rows.start // STRIP * STRIP
        part = strip[rows.start - first : rows.stop - first, columns.start - first : columns.stop - first]
        found: NDArray[np.float32] = part.detach().cpu().numpy().reshape(out.shape)
        return found


class Sum(Triangle):
    """Two of them added up part by part as they are read, in no pass over memory of its own; bits are those of adding
    the values, as every one is the same addition.

    Raises:
        ValueError: they are of different widths, dtypes or bands.
    """

    def __init__(self, left: Triangle, right: Triangle) -> None:
        for what in ("dtype", "width", "band"):
            if getattr(left, what) != getattr(right, what):
                raise ValueError(f"{what} {getattr(left, what)} and {getattr(right, what)}: they have no sum")
        self.width, self.dtype, self.band = left.width, left.dtype, left.band
        # a sum of sums from the left is read in one pass: of a thousand experts without as many calls inside each other
        self._first: Triangle = left._first if isinstance(left, Sum) else left
        self._others: tuple[Triangle, ...] = (*left._others, right) if isinstance(left, Sum) else (right,)

    def read(self, rows: slice, columns: slice, out: NDArray[np.float32]) -> None:
        """Copy a part of the sum."""
        self._first.read(rows, columns, out)
        for other in self._others:
            other.add_to(rows, columns, out)

    def add_to(self, rows: slice, columns: slice, out: NDArray[np.float32]) -> None:
        """Add a part of the sum, which is added up first."""
        with _spare.memory(out.size) as memory:
            found = memory.reshape(out.shape)
            self.read(rows, columns, found)
            np.add(out, found, out=out)


class _Spare(threading.local):
    """Memory for a part, of every thread its own: of fresh memory the system clears each page first, for one thread of
    a process at a time."""

    def __init__(self) -> None:
        self._free: list[NDArray[np.float32]] = []

    @contextmanager
    def memory(self, size: int) -> Iterator[NDArray[np.float32]]:
        """``size`` values."""
        held = self._free.pop() if self._free else np.empty(0, dtype=np.float32)
        if len(held) < size:
            held = np.empty(size, dtype=np.float32)
        try:
            yield held[:size]
        finally:
            self._free.append(held)


_spare = _Spare()


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
