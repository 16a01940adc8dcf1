"""Sites whose candidates are found in two parts, each with some of the choices, so that two workers can share them.

The down projection of a 70B block is more than half of its block's arithmetic; of a model of few blocks one worker
would be at it while the others wait. Each part reads and factors the Hessian again, by count 5% more of the site's
arithmetic with 12 choices. What is cut depends on sizes alone: any number of workers computes the same parts, and so
stores the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from lrpq.model.layers import Choice, LinearSpec

T = TypeVar("T")
NUM_PARTS = 2
LEAST_ELEMENTS = 1 << 28
"""Of weights times choices: below, a part's own factorisation and reading are no small part of it."""
LEAST_SHARE = 1 / 8
"""Of the arithmetic of the whole model: smaller sites are many, and workers share these as they are."""


def cut_sites(specs: Iterable[LinearSpec], choices: Sequence[Choice]) -> frozenset[tuple[int, str]]:
    """(block, input site) of the sites that are cut."""
    arithmetic: dict[tuple[int, str], float] = {}
    elements: dict[tuple[int, str], int] = {}
    for spec in specs:
        site, count = (spec.block, spec.input_site), sum(choice.fits(spec.d_in) for choice in choices)
        elements[site] = elements.get(site, 0) + spec.d_out * spec.d_in * count
        arithmetic[site] = arithmetic.get(site, 0.0) + float(spec.d_out) * spec.d_in**2 * count
    least = LEAST_SHARE * sum(arithmetic.values())
    return frozenset(site for site, size in elements.items() if size >= LEAST_ELEMENTS and arithmetic[site] > least)


def part_of(choices: Sequence[T], part: int | None) -> list[T]:
    """Consecutive choices of a part, as many as of the others or one more; of a site that is not cut, all."""
    if part is None:
        return list(choices)
    size = -(-len(choices) // NUM_PARTS)
    return list(choices[part * size : (part + 1) * size])
