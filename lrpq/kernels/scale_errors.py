"""What a grid of given scales leaves of every group's weights, and what refits its scale, for CPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lrpq.kernels import loops
from lrpq.kernels.threads import in_threads, strips

if TYPE_CHECKING:
    from jaxtyping import Float
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
        loops.write_errors(begin, end, low, high, *arrays)

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
        loops.write_fit(begin, end, low, high, *arrays)

    in_threads(work, w.shape[0] * strips(w.shape[2]))
