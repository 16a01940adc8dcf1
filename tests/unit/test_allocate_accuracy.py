"""The smallest budget that keeps an accuracy, searched on curves whose answer is known."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from lrpq.allocate.accuracy import TOLERANCE_BITS, Found, smallest_budget
from lrpq.errors import BudgetError


class Curve:
    """KL = scale 4^(3 - bits), with a bend; remembers what it was asked."""

    def __init__(self, scale: float, bend: float = 0.0) -> None:
        self.scale, self.bend = scale, bend
        self.asked: list[float] = []

    def at(self, bits: float) -> float:
        return self.scale * 4.0 ** (3 - bits) * math.exp(self.bend * math.sin(3 * bits))

    def real(self, bits: float) -> float:
        self.asked.append(bits)
        return self.at(bits)

    def quick(self, budgets: Sequence[float]) -> list[float]:
        return [self.at(bits) for bits in budgets]


def search(quick: Curve, real: Curve | None, max_kl: float) -> Found:
    return smallest_budget(quick.quick, None if real is None else real.real, lowest=2.25, highest=8.25, max_kl=max_kl)


@pytest.mark.parametrize("max_kl", [0.5, 0.1, 0.05, 0.01, 0.001])
@pytest.mark.parametrize("ratio", [0.4, 0.7, 1.0, 1.3])
@pytest.mark.parametrize("bend", [0.0, 0.2])
def test_the_limit_is_kept_at_next_to_the_smallest_budget(max_kl: float, ratio: float, bend: float) -> None:
    quick, real = Curve(0.5, bend), Curve(0.5 * ratio, 0.0)
    found = search(quick, real, max_kl)
    assert found.kl_nats == real.at(found.bits) <= max_kl
    exact = max(2.25, 3 + math.log(0.5 * ratio / max_kl, 4))
    assert exact - 1e-9 <= found.bits <= exact + 0.2
    assert len(real.asked) <= 6
    assert found.tried == tuple((bits, real.at(bits)) for bits in real.asked)


def test_with_one_ratio_for_all_budgets_two_tries_suffice() -> None:
    quick, real = Curve(0.5), Curve(0.3)
    found = search(quick, real, 0.05)
    assert len(real.asked) <= 3
    assert found.bits == pytest.approx(3 + math.log(0.3 / 0.05, 4), abs=3 * TOLERANCE_BITS)


def test_a_bump_in_the_curve_is_stepped_over() -> None:
    """Refined codes of a real model: more bits, and once no better."""
    bump = [(3.0, 0.0107), (3.76, 0.0105), (3.97, 0.0112), (4.3, 0.0090), (8.25, 0.0005)]
    asked: list[float] = []

    def real(bits: float) -> float:
        asked.append(bits)
        return next(kl for upper, kl in bump if bits <= upper)

    found = smallest_budget(Curve(0.03).quick, real, lowest=2.25, highest=8.25, max_kl=0.01)
    assert found.kl_nats == 0.0090
    assert found.bits < 4.3
    assert len(asked) <= 6


def test_without_refinement_the_quick_measure_counts() -> None:
    quick = Curve(0.5)
    found = search(quick, None, 0.05)
    exact = 3 + math.log(0.5 / 0.05, 4)
    assert exact <= found.bits <= exact + 0.1
    assert found.kl_nats <= 0.05
    assert search(quick, None, 100.0).bits == 2.25


@pytest.mark.parametrize("real", [None, Curve(0.3)])
def test_one_possible_budget_is_taken_or_refused(real: Curve | None) -> None:
    quick = Curve(0.5)
    asked = None if real is None else real.real
    found = smallest_budget(quick.quick, asked, lowest=4.25, highest=4.25, max_kl=0.5)
    assert found.bits == 4.25
    with pytest.raises(BudgetError, match=r"at 4\.25 bits"):
        smallest_budget(quick.quick, asked, lowest=4.25, highest=4.25, max_kl=1e-6)


def test_a_lossless_budget_is_no_division_by_zero() -> None:
    found = smallest_budget(Curve(0.5).quick, lambda bits: 0.0, lowest=2.25, highest=8.25, max_kl=0.01)
    assert found.kl_nats == 0.0


def test_what_cannot_be_reached_is_refused_with_what_can() -> None:
    for real in (None, Curve(0.4)):
        with pytest.raises(BudgetError, match=r"at 8\.25 bits, the most these choices take"):
            search(Curve(0.5), real, 1e-9)


def test_a_loose_limit_takes_the_smallest_budget() -> None:
    real = Curve(0.3)
    assert search(Curve(0.5), real, 10.0).bits == 2.25
    assert real.asked == [2.25]
