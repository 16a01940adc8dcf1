"""Plans that are searched: swaps, Shapley values and CoopQ's program against enumeration."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrpq.allocate.cooperative import cost_of, demote, shrunk
from lrpq.allocate.options import CostRow
from lrpq.allocate.swaps import Choices, swap_moves, with_swaps
from lrpq.errors import BudgetError, QuantizationError
from lrpq.importance.shapley import LOW, demotion_orders, progressive_demotion
from lrpq.model.layers import Choice, LinearSpec

BITS = (2, 3, 4)
SHAPES = ((8, 64), (8, 64), (16, 64), (16, 64), (24, 64))


def rows_of(costs: Sequence[Sequence[float]]) -> list[CostRow]:
    return [
        CostRow(
            module=LinearSpec(
                name=f"m{index}",
                block=index,
                d_out=d_out,
                d_in=d_in,
                input_site="o",
                fused_group=f"m{index}",
            ),
            choice=Choice(bits=bits, group_size=64),
            storage_bits=d_out * d_in * bits,
            cost_nats=cost,
        )
        for index, ((d_out, d_in), of_module) in enumerate(zip(SHAPES, costs, strict=True))
        for bits, cost in zip(BITS, of_module, strict=True)
    ]


def choices_of(widths: Sequence[int]) -> dict[str, Choice]:
    return {f"m{index}": Choice(bits=bits, group_size=64) for index, bits in enumerate(widths)}


def storage(rows: Sequence[CostRow], choices: Choices) -> int:
    return sum(row.storage_bits for row in rows if choices[row.module.name] == row.choice)


def predicted(rows: Sequence[CostRow], choices: Choices) -> float:
    return math.fsum(row.cost_nats for row in rows if choices[row.module.name] == row.choice)


costs = st.lists(st.lists(st.integers(0, 1000).map(lambda n: n / 64), min_size=3, max_size=3), min_size=5, max_size=5)
widths = st.lists(st.sampled_from(BITS), min_size=5, max_size=5)


@settings(max_examples=60)
@given(costs=costs, widths=widths, at_most=st.integers(1, 60))
def test_moves_are_all_plans_of_equal_storage_that_differ_in_two_modules(
    costs: list[list[float]], widths: list[int], at_most: int
) -> None:
    rows, plan = rows_of(costs), choices_of(widths)
    neighbours = [
        other
        for other in map(choices_of, itertools.product(BITS, repeat=len(SHAPES)))
        if storage(rows, other) == storage(rows, plan) and sum(other[name] != plan[name] for name in plan) == 2
    ]
    every = swap_moves(rows, plan, at_most=10_000)
    made = [move.of(plan) for move in every]
    assert sorted(map(str, made)) == sorted(map(str, neighbours))
    for move, other in zip(every, made, strict=True):
        assert move.predicted_nats == predicted(rows, other) - predicted(rows, plan)
    assert [m.predicted_nats for m in every] == sorted(m.predicted_nats for m in every)
    assert swap_moves(rows, plan, at_most=at_most) == every[:at_most]
    assert swap_moves(rows, plan, at_most=10_000, without=every[::2]) == every[1::2]


@settings(max_examples=40)
@given(costs=costs, widths=widths, seed=st.integers(0, 1000))
def test_swaps_descend_in_what_is_measured(costs: list[list[float]], widths: list[int], seed: int) -> None:
    """The measured KL is another function than the costs; with windows that agree only its mean matters."""
    rows, plan = rows_of(costs), choices_of(widths)
    drawn = np.random.default_rng(seed)
    landscape: dict[str, float] = {}

    def kl(choices: Choices) -> float:
        return landscape.setdefault(str(sorted(choices.items())), float(drawn.uniform(0.0, 1.0)))

    def measure(plans: Sequence[Choices]) -> list[list[float]]:
        asked.append(len(plans))
        return [[kl(choices)] * 3 for choices in plans]

    asked: list[int] = []
    found = with_swaps(rows, plan, measure, rounds=3, moves_a_round=1000)
    assert storage(rows, found.choices) == storage(rows, plan)
    assert (kl(found.choices) < kl(plan)) == (found.num_accepted > 0)
    assert found.num_tried == sum(n - 1 for n in asked)
    first = [move.of(plan) for move in swap_moves(rows, plan, at_most=10_000)]
    best = min([kl(plan), *map(kl, first)])
    assert kl(found.choices) <= best  # the first round takes the best of all moves
    assert found.num_accepted <= 3


def test_a_swap_within_the_noise_of_the_windows_is_not_made() -> None:
    rows, plan = rows_of([[3.0, 2.0, 1.0]] * 5), choices_of([2, 3, 3, 3, 3])
    (move,) = swap_moves(rows, plan, at_most=1)
    better = move.of(plan)

    def measure(falls: Sequence[float]) -> int:
        def kl(plans: Sequence[Choices]) -> list[list[float]]:
            return [[1.0 - fall if of == better else 1.0 for fall in falls] for of in plans]

        return with_swaps(rows, plan, kl, rounds=1, moves_a_round=1).num_accepted

    assert measure([0.1, 0.2, 0.3]) == 1
    assert measure([0.5, -0.4, 0.0]) == 0  # its mean falls, by less than its standard error
    assert measure([-0.1, -0.1, -0.1]) == 0
    assert measure([0.1]) == 1
    with pytest.raises(QuantizationError, match="not finite"):
        measure([math.nan])


PLAYERS = 5


def game(seed: int) -> tuple[np.ndarray, np.ndarray]:
    drawn = np.random.default_rng(seed)
    pairs = drawn.normal(size=(PLAYERS, PLAYERS))
    return drawn.uniform(0.5, 2.0, PLAYERS), pairs + pairs.T


def worth(low: Sequence[int], seed: int) -> float:
    alone, pairs = game(seed)
    triple = 0.7 if {0, 2, 3} <= set(low) else 0.0
    return float(sum(alone[i] for i in low) + sum(pairs[i, j] for i, j in itertools.combinations(low, 2)) + triple)


@pytest.mark.parametrize("seed", [0, 1])
def test_shapley_values_are_their_definition(seed: int) -> None:
    """Over all orders; v of a coalition weighed by how often it comes before a player."""
    asked: list[int] = []

    def payoffs(plans: Mapping[str, Sequence[Hashable]]) -> dict[str, list[float]]:
        asked.append(len(plans))
        lows = {name: [i for i, key in enumerate(keys) if key == LOW] for name, keys in plans.items()}
        return {name: [worth(low, seed) + 0.25, worth(low, seed) - 0.25] for name, low in lows.items()}

    orders = list(itertools.permutations(range(PLAYERS)))
    found = progressive_demotion(PLAYERS, orders, payoffs)
    assert asked == [2**PLAYERS]  # every coalition once
    for player in range(PLAYERS):
        others = [i for i in range(PLAYERS) if i != player]
        expected = 0.0
        for size in range(PLAYERS):
            share = math.factorial(size) * math.factorial(PLAYERS - size - 1) / math.factorial(PLAYERS)
            for before in itertools.combinations(others, size):
                expected += share * (worth(sorted((*before, player)), seed) - worth(before, seed))
        assert found.values[player] == pytest.approx(expected)
    assert sum(found.values) == pytest.approx(worth(range(PLAYERS), seed))
    marginals = np.array(
        [
            [worth(sorted(order[: order.index(p) + 1]), seed) - worth(sorted(order[: order.index(p)]), seed)]
            for p in range(PLAYERS)
            for order in orders
        ]
    ).reshape(PLAYERS, -1)
    centred = marginals - marginals.mean(1, keepdims=True)
    np.testing.assert_allclose(found.covariance, centred @ centred.T / (len(orders) - 1), atol=1e-12)


def test_orders_come_with_their_reverses_and_from_the_seed() -> None:
    orders = demotion_orders(6, 5, seed=3)
    assert len(orders) == 5
    assert all(sorted(order) == list(range(6)) for order in orders)
    assert orders[1] == orders[0][::-1]
    assert orders == demotion_orders(6, 5, seed=3)
    assert orders != demotion_orders(6, 5, seed=4)
    with pytest.raises(QuantizationError, match="0 orders"):
        demotion_orders(6, 0, seed=0)


def test_one_order_has_no_covariance() -> None:
    found = progressive_demotion(2, [(0, 1)], lambda plans: {n: [float(n.count("l"))] for n in plans})
    assert found.values == (1.0, 1.0)
    assert found.covariance == ((0.0, 0.0), (0.0, 0.0))


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), share=st.floats(0.0, 1.0), size=st.integers(1, 7))
def test_the_program_is_solved_to_its_optimum(seed: int, share: float, size: int) -> None:
    drawn = np.random.default_rng(seed)
    values = drawn.normal(1.0, 1.0, size).tolist()
    marginals = drawn.normal(0.0, 1.0, (4, size)) * 10.0 ** drawn.integers(-3, 1)
    covariance = np.atleast_2d(np.cov(marginals, rowvar=False)).tolist()
    saved = (drawn.integers(1, 6, size) * 4096).tolist()
    needed = int(share * sum(saved))
    pairs = shrunk(covariance)
    for i, j in itertools.product(range(size), repeat=2):
        assert pairs[i][j] == covariance[i][j] * (1.0 if i == j else 0.5)
    found = demote(values, pairs, saved, needed_bits=needed)
    feasible = [
        low
        for low in itertools.product((False, True), repeat=size)
        if sum(b for b, demoted in zip(saved, low, strict=True) if demoted) >= needed
    ]
    x = np.array(feasible, dtype=float)
    objective = x @ np.array(values) + 0.5 * np.einsum("ki,ij,kj->k", x, np.array(pairs), x)
    assert found.low in feasible
    assert found.cost == pytest.approx(cost_of(found.low, values, pairs))
    assert found.cost == pytest.approx(float(objective.min()), rel=1e-5, abs=1e-9)
    assert found.bound <= found.cost
    assert not found.stopped_early


def test_what_cannot_be_saved_or_is_not_finite_is_said() -> None:
    with pytest.raises(BudgetError, match="save 3 bits of 4"):
        demote([1.0, 1.0], [[0.0, 0.0], [0.0, 0.0]], [1, 2], needed_bits=4)
    with pytest.raises(QuantizationError, match="not finite"):
        demote([1.0, math.nan], [[0.0, 0.0], [0.0, 0.0]], [1, 2], needed_bits=1)
    nothing = demote([1.0, 1.0], [[0.0, 0.0], [0.0, 0.0]], [1, 2], needed_bits=-5)
    assert nothing.low == (False, False)
