"""The smallest budget that keeps an accuracy: bisection on bits with measured divergences.

After "Augmenting Hessians with Inter-Layer Dependencies for Mixed-Precision Post-Training Quantization" (2023), which
lowers layers in an order until a limit on accuracy is met. Here the order is that of the allocation itself: a plan for
every budget, and the budget is searched. Two ways of measuring a budget are told apart: a quick one (stored
candidates), of which many are measured in one pass, and the one that counts (the refined codes), which costs a
refinement each.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lrpq.allocate.forecast import REFINED
from lrpq.errors import BudgetError

Quick = Callable[[Sequence[float]], Sequence[float]]
"""From budgets (all-in bits per weight) to the quick estimate of their KL, nats per token."""
Real = Callable[[float], float]
"""From a budget to the KL of what would be written, nats per token."""

GRID = 9
"""Budgets measured quickly at once."""
TOLERANCE_BITS = 0.02
"""Between budgets closer than this the choice is noise."""
MAX_TRIES = 6
"""Refinements."""
_SMALLEST = 1e-12
"""KL below which logarithms say nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The smallest budget that was measured to keep the limit."""

    bits: float
    kl_nats: float
    tried: tuple[tuple[float, float], ...]
    """(bits, KL) of every budget measured by the real way, in order."""


def smallest_budget(quick: Quick, real: Real | None, *, lowest: float, highest: float, max_kl: float) -> Found:
    """Search the budgets from ``lowest`` to ``highest`` for the smallest whose KL is at most ``max_kl``.

    The quick estimate is measured on a grid, between whose points its logarithm is taken to be linear in bits; its
    ratio to the real KL, at first what refinement leaves elsewhere, is learned from the budgets that are tried. Without
    ``real`` the quick one counts.

    Raises:
        BudgetError: not even the highest budget keeps the limit; what it reaches is named.
    """
    if highest <= lowest:  # one budget: keep rules, or one choice
        kl = quick([lowest])[0] if real is None else real(lowest)
        if kl > max_kl:
            raise _impossible(max_kl, (lowest, kl))
        return Found(bits=lowest, kl_nats=kl, tried=((lowest, kl),))
    budgets = [lowest + (highest - lowest) * i / (GRID - 1) for i in range(GRID)]
    curve = list(zip(budgets, quick(budgets), strict=True))
    if real is None:
        return _by_quick(curve, quick, max_kl)
    tried: list[tuple[float, float]] = []
    good: tuple[float, float] | None = None
    too_small = -math.inf
    ratio, step = REFINED, 2 * TOLERANCE_BITS
    while len(tried) < MAX_TRIES:
        bits = _crossing(curve, max_kl / ratio)
        bits = bits if bits == lowest else bits + TOLERANCE_BITS / 2  # the estimate is as often too small as too large
        bits = min(max(bits, too_small + step), highest)
        if good is not None and bits > good[0] - TOLERANCE_BITS:
            break
        kl = real(bits)
        tried.append((bits, kl))
        if kl <= max_kl:
            good = (bits, kl)
        elif bits == highest:
            raise _impossible(max_kl, tried[-1])
        else:
            too_small, step = bits, 2 * step  # a curve with bumps: never creep
        ratio = max(kl, _SMALLEST) / _interpolated(curve, bits)
        if bits == lowest and good is not None:
            break
    if good is None:
        tried.append((highest, real(highest)))
        if tried[-1][1] > max_kl:
            raise _impossible(max_kl, tried[-1])
        good = tried[-1]
    return Found(bits=good[0], kl_nats=good[1], tried=tuple(tried))


def _by_quick(curve: Sequence[tuple[float, float]], quick: Quick, max_kl: float) -> Found:
    if curve[-1][1] > max_kl:
        raise _impossible(max_kl, curve[-1])
    upper = next(i for i, (_, kl) in enumerate(curve) if kl <= max_kl)
    if upper == 0:
        return Found(bits=curve[0][0], kl_nats=curve[0][1], tried=(curve[0],))
    low, high = curve[upper - 1][0], curve[upper][0]
    finer = [low + (high - low) * i / (GRID - 1) for i in range(1, GRID)]
    measured = list(zip(finer, quick(finer), strict=True))
    bits, kl = next((point for point in measured if point[1] <= max_kl), curve[upper])
    return Found(bits=bits, kl_nats=kl, tried=tuple(measured))


def _crossing(curve: Sequence[tuple[float, float]], limit: float) -> float:
    """Where the falling curve first meets the limit; the end of the curve if it never does."""
    for (low, before), (high, after) in itertools.pairwise(curve):
        if before <= limit:
            return low
        if after <= limit:
            share = (_log(before) - _log(limit)) / max(_log(before) - _log(after), 1e-12)
            return low + share * (high - low)
    return curve[-1][0]


def _interpolated(curve: Sequence[tuple[float, float]], bits: float) -> float:
    for (low, before), (high, after) in itertools.pairwise(curve):
        if bits <= high:
            share = (bits - low) / (high - low)
            return math.exp((1 - share) * _log(before) + share * _log(after))
    return max(curve[-1][1], _SMALLEST)


def _log(kl: float) -> float:
    return math.log(max(kl, _SMALLEST))


def _impossible(max_kl: float, best: tuple[float, float]) -> BudgetError:
    return BudgetError(
        f"KL of at most {max_kl:g} nats a token: at {best[0]:.2f} bits, the most these choices take, it is "
        f"{best[1]:.4g}; raise --max-kl or allow wider --bits"
    )
