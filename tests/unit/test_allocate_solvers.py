"""Exact and Lagrangian solutions against dynamic programming, odd sizes, and the baselines."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from lrpq.allocate.baselines import nearest_uniform, two_level, uniform
from lrpq.allocate.budget import BudgetBits
from lrpq.allocate.knapsack import frontier, lower_bound, solve_exact, solve_lagrangian
from lrpq.allocate.plan import Method
from lrpq.allocate.problem import CostRow, Group, Option, Problem, build_problem
from lrpq.errors import BudgetError, ConfigError, QuantizationError
from lrpq.model.layers import Choice, LinearSpec


def linear(index: int, *, d_out: int = 8, d_in: int = 64) -> LinearSpec:
    name = f"model.layers.{index}.o_proj"
    return LinearSpec(name=name, block=index, d_out=d_out, d_in=d_in, input_site="o", fused_group=name)


def random_problem(
    seed: int, *, groups: int, options: int, largest_bits: int, share: float, noise: float = 0.3
) -> Problem:
    """Costs that fall with bits as 4^-bits do, with noise: some options are dominated."""
    source = random.Random(seed)
    built = []
    for index in range(groups):
        size = source.randint(1, max(largest_bits // options, 1))
        scale = math.exp(source.gauss(0, 2))
        built.append(
            Group(
                name=f"g{index}",
                members=(linear(index),),
                options=tuple(
                    Option(
                        choice=Choice(bits=bits, group_size=-1),
                        storage_bits=size * bits + source.randint(0, max(size // 9, 1)),
                        cost_nats=scale * 4.0**-bits * math.exp(source.gauss(0, noise)),
                    )
                    for bits in range(1, options + 1)
                ),
            )
        )
    smallest = sum(min(o.storage_bits for o in g.options) for g in built)
    largest = sum(max(o.storage_bits for o in g.options) for g in built)
    return Problem(groups=tuple(built), capacity_bits=smallest + int(share * (largest - smallest)))


def dynamic_programming(problem: Problem) -> float:
    """Least cost, over every capacity at once."""
    best = np.zeros(problem.capacity_bits + 1)
    for group in problem.groups:
        longer = np.full_like(best, np.inf)
        for option in group.options:
            bits = option.storage_bits
            if bits <= problem.capacity_bits:
                shifted = best[: len(best) - bits] + option.cost_nats
                longer[bits:] = np.minimum(longer[bits:], shifted)
        best = longer
    return float(best[-1])


@pytest.mark.parametrize("seed", range(12))
def test_exact_matches_dynamic_programming(seed: int) -> None:
    problem = random_problem(seed, groups=30, options=6, largest_bits=60, share=random.Random(seed).uniform(0.02, 0.7))
    best = dynamic_programming(problem)
    exact = solve_exact(problem, relative_gap=1e-9)
    assert exact.method is Method.EXACT
    assert exact.storage_bits <= problem.capacity_bits
    assert exact.cost_nats == pytest.approx(best, rel=2e-9, abs=0)
    assert exact.bound_nats <= best * (1 + 1e-12)

    lagrangian = solve_lagrangian(problem)
    assert lagrangian.storage_bits <= problem.capacity_bits
    assert lagrangian.bound_nats <= best * (1 + 1e-12)
    assert best * (1 - 1e-12) <= lagrangian.cost_nats
    assert lagrangian.gap < 0.2  # that a bound is honest says nothing about whether it is any good


def test_some_of_these_problems_need_the_integer_program() -> None:
    # else the comparison above would only test the relaxation
    problems = [random_problem(seed, groups=30, options=6, largest_bits=60, share=0.3) for seed in range(12)]
    better = [solve_exact(p).cost_nats < solve_lagrangian(p).cost_nats for p in problems]
    assert sum(better) >= 6


@pytest.mark.parametrize("largest_bits", [10**4, 10**8, 10**12])
@pytest.mark.parametrize("seed", range(3))
def test_sizes_without_common_divisor_up_to_405b(seed: int, largest_bits: int) -> None:
    problem = random_problem(seed, groups=60, options=7, largest_bits=largest_bits, share=0.35)
    assert math.gcd(*(o.storage_bits for g in problem.groups for o in g.options)) == 1
    plan = solve_exact(problem)
    assert plan.storage_bits <= problem.capacity_bits
    assert plan.gap <= 1.1e-6
    assert not plan.stopped_early
    assert plan.binding
    # the budget is used: less than the smallest step is free
    assert (problem.capacity_bits - plan.storage_bits) / problem.capacity_bits < 0.002
    assert solve_exact(problem) == plan


@pytest.mark.parametrize("seed", range(5))
def test_lagrangian_leaves_no_capacity_that_would_buy_something(seed: int) -> None:
    problem = random_problem(seed, groups=30, options=6, largest_bits=60, share=0.3)
    plan = solve_lagrangian(problem)
    free = problem.capacity_bits - plan.storage_bits
    for group in problem.groups:
        pick = next(o for o in group.options if o.choice == plan.choices[group.members[0].name])
        better = [o.storage_bits - pick.storage_bits for o in group.options if o.cost_nats < pick.cost_nats]
        assert all(extra > free for extra in better)


def test_a_limit_of_no_time_is_reported_and_still_within_the_capacity() -> None:
    problem = random_problem(1, groups=60, options=7, largest_bits=10**8, share=0.35)
    plan = solve_exact(problem, time_limit_s=0.0)
    assert plan.stopped_early
    assert plan.storage_bits <= problem.capacity_bits
    assert plan.cost_nats <= solve_lagrangian(problem).cost_nats
    assert plan.bound_nats <= solve_exact(problem).cost_nats
    assert 1e-6 < plan.gap < 0.1


def test_dominated_options_are_counted_and_never_taken() -> None:
    options = tuple(
        Option(choice=Choice(bits=bits, group_size=-1), storage_bits=bits, cost_nats=cost)
        for bits, cost in ((2, 1.0), (3, 1.5), (4, 0.5), (5, 0.5), (8, 0.7))
    )
    group = Group(name="g", members=(linear(0),), options=options)
    for solve in (solve_exact, solve_lagrangian):
        for capacity, bits in ((2, 2), (3, 2), (4, 4), (100, 4)):
            plan = solve(Problem(groups=(group,), capacity_bits=capacity))
            assert plan.storage_bits == bits
            assert plan.num_dominated == 3
            assert plan.binding == (capacity < 4)
            assert plan.gap == 0.0 or capacity == 3


def test_frontier_by_hand() -> None:
    def group(name: str, index: int, *points: tuple[int, float]) -> Group:
        return Group(
            name=name,
            members=(linear(index),),
            options=tuple(
                Option(choice=Choice(bits=bits, group_size=-1), storage_bits=bits, cost_nats=cost)
                for bits, cost in points
            ),
        )

    # b's middle point lies above the line between its ends: on no frontier, but a plan may need it
    groups = (group("a", 0, (1, 10.0), (2, 4.0), (3, 3.0)), group("b", 1, (1, 5.0), (2, 4.5), (3, 1.0)))
    problem = Problem(groups=groups, capacity_bits=3)
    assert frontier(problem) == [(2, 15.0), (3, 9.0), (5, 5.0), (6, 4.0)]
    assert lower_bound(problem, capacity_bits=4) == 7.0
    best = solve_exact(Problem(groups=groups, capacity_bits=4))
    assert best.cost_nats == 8.0
    assert [choice.bits for choice in best.choices.values() if choice] == [3, 1]


# --- baselines


def measured(bits: tuple[int, ...] = (2, 3, 4, 8), sizes: tuple[int, ...] = (64,)) -> list[CostRow]:
    rows = []
    for index in range(4):
        module = linear(index, d_out=8 * (index + 1), d_in=128)
        for choice in (Choice(bits=b, group_size=s) for b in bits for s in sizes):
            storage = module.num_weights * choice.bits + 16 * module.d_out * choice.groups(128)
            cost = (5 - index) ** 3 * 4.0**-choice.bits
            rows.append(CostRow(module=module, choice=choice, storage_bits=storage, cost_nats=cost))
    return rows


def test_uniform_ignores_the_capacity_and_is_bounded_at_its_own_size() -> None:
    problem = build_problem(measured(), budget=BudgetBits(bits=3.25))
    plan = uniform(problem, Choice(bits=4, group_size=64))
    assert plan.method is Method.UNIFORM
    assert set(plan.choices.values()) == {Choice(bits=4, group_size=64)}
    assert plan.average_bits == 4.25
    assert plan.storage_bits > plan.capacity_bits == problem.capacity_bits
    same_size = Problem(groups=problem.groups, capacity_bits=plan.storage_bits)
    assert plan.bound_bits == plan.storage_bits
    assert plan.bound_nats <= solve_exact(same_size).cost_nats < plan.cost_nats
    with pytest.raises(ConfigError, match="has no choice 5b/g64; it has 2b/g64"):
        uniform(problem, Choice(bits=5, group_size=64))


@pytest.mark.parametrize(
    ("at_bits", "choice"),
    [
        (3.25, Choice(bits=3, group_size=64)),
        (3.74, Choice(bits=3, group_size=64)),
        (3.75, Choice(bits=4, group_size=64)),  # as near to 3.25: the wider one
        (1.0, Choice(bits=2, group_size=64)),
        (16.0, Choice(bits=8, group_size=64)),
        (4.12, Choice(bits=4, group_size=-1)),  # 4.125
    ],
)
def test_nearest_uniform(at_bits: float, choice: Choice) -> None:
    problem = build_problem(
        measured(sizes=(64, -1)) if choice.group_size == -1 else measured(), budget=BudgetBits(bits=4.25)
    )
    assert set(nearest_uniform(problem, at_bits=at_bits).choices.values()) == {choice}


def test_nearest_uniform_is_to_the_budget_unless_told() -> None:
    problem = build_problem(measured(), budget=BudgetBits(bits=4.0))
    assert nearest_uniform(problem).average_bits == 4.25
    rows = measured()
    only = [row for row in rows if row.module.block or row.choice == Choice(bits=8, group_size=64)]
    mixed = build_problem([r for r in only if r.module.block == 0 or r.choice.bits != 8], budget=BudgetBits(bits=5.0))
    with pytest.raises(ConfigError, match="no choice is common"):
        nearest_uniform(mixed)


def test_two_level_raises_the_most_important_first_and_fills() -> None:
    low, high = Choice(bits=2, group_size=64), Choice(bits=4, group_size=64)
    rows = measured()
    weights = [row.module.num_weights for row in rows if row.choice == low]
    names = [row.module.name for row in rows if row.choice == low]
    # layers hold 1, 2, 3 and 4 parts; room to raise 5 of the 10
    problem = build_problem(rows, budget=BudgetBits(bits=2.25 + 2 * 0.5))
    assert sum(weights) == 10 * weights[0]

    def raised(*scores: float) -> list[int]:
        plan = two_level(problem, dict(zip(names, scores, strict=True)), low=low, high=high)
        assert plan.storage_bits <= problem.capacity_bits
        assert plan.method is Method.TWO_LEVEL
        assert set(plan.choices.values()) == {low, high}
        return [index for index, name in enumerate(names) if plan.choices[name] == high]

    assert raised(4, 3, 2, 1) == [0, 1]  # then 2 free: neither 3 nor 4 parts
    assert raised(1, 2, 3, 4) == [0, 3]  # 4, then 3 and 2 do not fit, 1 does
    assert raised(0, 0, 0, 0) == [0, 1]
    assert raised(-1, -1, 5, 0) == [0, 2]  # equal scores in the order of layers


def test_two_level_refusals() -> None:
    low, high = Choice(bits=2, group_size=64), Choice(bits=4, group_size=64)
    problem = build_problem(measured(), budget=BudgetBits(bits=3.0))
    names = [group.members[0].name for group in problem.groups]
    good = dict.fromkeys(names, 1.0)
    with pytest.raises(ConfigError, match="no importance score"):
        two_level(problem, dict.fromkeys(names[1:], 1.0), low=low, high=high)
    with pytest.raises(QuantizationError, match="expected finite"):
        two_level(problem, good | {names[2]: math.nan}, low=low, high=high)
    with pytest.raises(BudgetError, match="narrower low"):
        two_level(problem, good, low=high, high=Choice(bits=8, group_size=64))
    with pytest.raises(ConfigError, match="has no choice"):
        two_level(problem, good, low=low, high=Choice(bits=5, group_size=64))
