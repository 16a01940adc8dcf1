"""Hessians of wide sites in two bands of rows, each merged by one worker and stored in an object of its own.

The down projection of a 70B block has four fifths of its block's Hessians, 1.7 GB; stored by one worker, these are
what a profile ends with. What is cut depends on widths alone: any number of workers stores the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable

from lrpq.model.layers import HEAD, LinearSpec
from tasks.upper_triangle import Band

LEAST_WIDTH = 16384
"""Inputs of a site that is cut: its Hessian has half a gigabyte, and takes longer to store than another object does."""
FIRST, SECOND = Band(0, 3, 5), Band(3, 5, 5)
"""Three fifths of a wide site are, with the whole Hessians of narrow sites, half of what is stored of a 70B block."""
REST = "hessians-rest"
"""Kind of the object of the second bands; the first ones lie beside the whole Hessians of narrow sites."""


def wide_sites(specs: Iterable[LinearSpec]) -> frozenset[tuple[int, str]]:
    """(block, input site) of the sites whose Hessians are cut; experts' are not, whose sums are pooled."""
    wide = (s for s in specs if s.d_in >= LEAST_WIDTH and not s.routed and s.input_site != HEAD)
    return frozenset((spec.block, spec.input_site) for spec in wide)
