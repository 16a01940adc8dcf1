"""What a grid of given scales leaves of every group's weights, and what refits its scale, for CPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lrpq.kernels.compiled import LANES, compiled, in_threads, strips

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy.typing import NDArray
    from torch import Tensor


def write_errors(
    w: Float[Tensor, "groups width rows"],
    importance: Float[Tensor, "groups 1 width"],
    inverses: Float[Tensor, "tried groups 1 rows"],
    errors: Float[Tensor, "tried groups 1 rows"],
    bounds: tuple[int, int],
) -> None:
    """Weighted squared errors of rounding, in units of the scale squared, for every 1 / scale tried.

    A group of 64 rows stays in cache while all scales are tried: seven operations a weight and scale.
    """
    arrays = [x.numpy() for x in (w, importance, inverses, errors)]
    low, high = np.float32(bounds[0]), np.float32(bounds[1])

    def work(begin: int, end: int) -> None:
        _write_errors(begin, end, low, high, *arrays)

    in_threads(work, w.shape[0] * strips(w.shape[2]))


def write_fit(
    w: Float[Tensor, "groups width rows"],
    importance: Float[Tensor, "groups 1 width"],
    inverse: Float[Tensor, "groups 1 rows"],
    product: Float[Tensor, "groups 1 rows"],
    squares: Float[Tensor, "groups 1 rows"],
    bounds: tuple[int, int],
) -> None:
    """Weighted sums of weight times code and of squared codes, at one 1 / scale."""
    arrays = [x.numpy() for x in (w, importance, inverse, product, squares)]
    low, high = np.float32(bounds[0]), np.float32(bounds[1])

    def work(begin: int, end: int) -> None:
        _write_fit(begin, end, low, high, *arrays)

    in_threads(work, w.shape[0] * strips(w.shape[2]))


@compiled
def _write_errors(
    begin: int,
    end: int,
    low: np.float32,
    high: np.float32,
    w: NDArray[np.float32],
    importance: NDArray[np.float32],
    inverses: NDArray[np.float32],
    errors: NDArray[np.float32],
) -> None:
    _, width, num_rows = w.shape
    per_group = -(-num_rows // LANES)
    weights = np.zeros((width, LANES), np.float32)
    scale = np.zeros(LANES, np.float32)
    total = np.zeros(LANES, np.float32)
    for strip in range(begin, end):
        group = strip // per_group
        first = (strip - group * per_group) * LANES
        last = min(first + LANES, num_rows)
        v = importance[group, 0]
        for column in range(width):
            weights[column, : last - first] = w[group, column, first:last]
        for t in range(len(inverses)):
            scale[: last - first] = inverses[t, group, 0, first:last]
            total[:] = 0.0
            for column in range(width):
                row, weight = weights[column], v[column]
                for i in range(LANES):
                    x = row[i] * scale[i]
                    d = x - min(max(np.rint(x), low), high)
                    total[i] += weight * (d * d)
            errors[t, group, 0, first:last] = total[: last - first]


@compiled
def _write_fit(
    begin: int,
    end: int,
    low: np.float32,
    high: np.float32,
    w: NDArray[np.float32],
    importance: NDArray[np.float32],
    inverse: NDArray[np.float32],
    product: NDArray[np.float32],
    squares: NDArray[np.float32],
) -> None:
    _, width, num_rows = w.shape
    per_group = -(-num_rows // LANES)
    row = np.zeros(LANES, np.float32)
    scale = np.zeros(LANES, np.float32)
    product_of, squares_of = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    for strip in range(begin, end):
        group = strip // per_group
        first = (strip - group * per_group) * LANES
        last = min(first + LANES, num_rows)
        scale[: last - first] = inverse[group, 0, first:last]
        product_of[:] = 0.0
        squares_of[:] = 0.0
        for column in range(width):
            row[: last - first] = w[group, column, first:last]
            weight = importance[group, 0, column]
            for i in range(LANES):
                q = min(max(np.rint(row[i] * scale[i]), low), high)
                product_of[i] += weight * (row[i] * q)
                squares_of[i] += weight * (q * q)
        product[group, 0, first:last] = product_of[: last - first]
        squares[group, 0, first:last] = squares_of[: last - first]
