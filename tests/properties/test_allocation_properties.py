"""Allocation on random problems: brute force, hard capacity, honest bounds, invariances."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrpq.allocate.budget import BudgetBits, BudgetBytes
from lrpq.allocate.knapsack import frontier, lower_bound, solve_exact, solve_lagrangian
from lrpq.allocate.plan import Plan
from lrpq.allocate.problem import CostRow, Group, Option, Problem, build_problem
from lrpq.errors import BudgetError
from lrpq.model.layers import Choice, LinearSpec

settings.register_profile("allocation", deadline=None, max_examples=100, derandomize=True)
MANY = settings.get_profile("allocation")

# Within a problem sizes are alike (that is where combinations matter), or far apart.
SIZES = [(1, 12, 1), (20, 99, 1), (1, 12, 8192 * 1024), (10**12, 10**13, 1), (1, 10**13, 1)]


def linear(index: int, *, block: int | None = None, group: str | None = None, d_out: int = 8) -> LinearSpec:
    return LinearSpec(
        name=f"model.layers.{index}.self_attn.o_proj",
        block=index if block is None else block,
        d_out=d_out,
        d_in=64,
        input_site="o",
        fused_group=group or f"group{index}",
    )


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Up to 5 groups of 5 options from uniform numbers: hypothesis's own prefer trivial problems."""
    source = random.Random(draw(st.integers(0, 2**32)))
    low, high, unit = draw(st.sampled_from(SIZES))
    rough = draw(st.booleans())  # costs with ties, zeros and dominated options; else falling with size
    groups = []
    for index in range(source.randint(1, 5)):
        count = source.randint(1, 5)
        sizes = [unit * source.randint(low, high) for _ in range(count)]
        costs = [source.choice([0.0, 1.0, 2.0, source.uniform(0, 3)]) for _ in sizes]
        if not rough:
            scale = math.exp(source.gauss(0, 2))
            sizes, costs = sorted(sizes), sorted((scale * source.random() for _ in sizes), reverse=True)
        options = tuple(
            Option(choice=Choice(bits=position + 2, group_size=-1), storage_bits=bits, cost_nats=cost)
            for position, (bits, cost) in enumerate(zip(sizes, costs, strict=True))
        )
        groups.append(Group(name=f"group{index}", members=(linear(index),), options=options))
    smallest = sum(min(option.storage_bits for option in group.options) for group in groups)
    largest = sum(max(option.storage_bits for option in group.options) for group in groups)
    capacity = smallest + draw(st.integers(0, 17)) * (largest - smallest) // 16
    return Problem(groups=tuple(groups), capacity_bits=capacity)


def brute_force(problem: Problem, capacity_bits: int) -> float:
    """Least cost over every combination of options within the capacity."""
    return min(
        math.fsum(option.cost_nats for option in picks)
        for picks in itertools.product(*(group.options for group in problem.groups))
        if sum(option.storage_bits for option in picks) <= capacity_bits
    )


def check_totals(problem: Problem, plan: Plan) -> None:
    """The plan's totals are those of its choices, and within the capacity in integers."""
    picked = [
        next(o for o in group.options if o.choice == plan.choices[group.members[0].name]) for group in problem.groups
    ]
    assert plan.storage_bits == sum(option.storage_bits for option in picked)
    assert plan.cost_nats == math.fsum(option.cost_nats for option in picked)
    assert plan.storage_bits <= problem.capacity_bits
    assert plan.bound_nats <= plan.cost_nats


def scaled(problem: Problem, factor: float) -> Problem:
    groups = tuple(
        Group(
            name=group.name,
            members=group.members,
            options=tuple(
                Option(choice=o.choice, storage_bits=o.storage_bits, cost_nats=o.cost_nats * factor)
                for o in group.options
            ),
        )
        for group in problem.groups
    )
    return Problem(groups=groups, capacity_bits=problem.capacity_bits)


@MANY
@given(problems())
def test_exact_is_the_brute_force_optimum(problem: Problem) -> None:
    plan = solve_exact(problem, relative_gap=1e-9)
    best = brute_force(problem, problem.capacity_bits)
    check_totals(problem, plan)
    assert plan.cost_nats == pytest.approx(best, rel=2e-9, abs=0)
    assert plan.bound_nats <= best * (1 + 1e-12)
    assert plan.gap <= 1e-8
    assert not plan.stopped_early


@MANY
@given(problems())
def test_lagrangian_keeps_to_the_capacity_and_to_its_own_gap(problem: Problem) -> None:
    plan = solve_lagrangian(problem)
    best = brute_force(problem, problem.capacity_bits)
    check_totals(problem, plan)
    assert plan.bound_nats <= best * (1 + 1e-12)
    assert best <= plan.cost_nats
    assert plan.cost_nats * (1 - plan.gap) <= best * (1 + 1e-12)
    assert solve_exact(problem).cost_nats <= plan.cost_nats
    # what is left of the capacity buys nothing more
    free = problem.capacity_bits - plan.storage_bits
    for group in problem.groups:
        pick = next(o for o in group.options if o.choice == plan.choices[group.members[0].name])
        for option in group.options:
            assert option.storage_bits - pick.storage_bits > free or option.cost_nats >= pick.cost_nats


@MANY
@given(problems(), st.integers(0, 10**13))
def test_more_capacity_never_costs_more(problem: Problem, extra: int) -> None:
    wider = Problem(groups=problem.groups, capacity_bits=problem.capacity_bits + extra)
    assert solve_exact(wider, relative_gap=1e-9).cost_nats <= solve_exact(problem).cost_nats * (1 + 2e-9)
    assert lower_bound(problem, capacity_bits=wider.capacity_bits) <= lower_bound(
        problem, capacity_bits=problem.capacity_bits
    ) * (1 + 1e-12)


@MANY
@given(problems(), st.integers(-40, 40), st.floats(1e-6, 1e6))
def test_scaling_all_costs_changes_nothing(problem: Problem, power: int, factor: float) -> None:
    for solve in (solve_exact, solve_lagrangian):
        plan = solve(problem)
        # a power of two rounds nothing, so every comparison and with it every choice is the same
        exactly = solve(scaled(problem, 2.0**power))
        assert exactly.choices == plan.choices
        assert exactly.bound_nats == pytest.approx(plan.bound_nats * 2.0**power, rel=1e-9)
    # any other factor may turn a tie, never the quality
    assert solve_exact(scaled(problem, factor)).cost_nats == pytest.approx(
        solve_exact(problem).cost_nats * factor, rel=3e-6
    )


@MANY
@given(problems())
def test_frontier_is_convex_and_each_point_is_the_best_of_its_size(problem: Problem) -> None:
    points = frontier(problem)
    assert points[0][0] == problem.minimum_bits
    assert points[-1][1] == brute_force(problem, 10**15)
    for bits, cost in points:
        assert cost == pytest.approx(brute_force(problem, bits), rel=1e-12, abs=0)
    slopes = [(a[1] - b[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(points)]
    assert all(slope > 0 for slope in slopes)
    # differences of totals carry the rounding of the largest total
    rounding = 1e-13 * points[0][1]
    for before, after, left, middle, right in zip(slopes, slopes[1:], points, points[1:], points[2:], strict=False):
        slack = rounding / (middle[0] - left[0]) + rounding / (right[0] - middle[0])
        assert after <= before + slack


def rows_of(modules: Sequence[LinearSpec], draw_cost: random.Random) -> list[CostRow]:
    return [
        CostRow(
            module=module,
            choice=choice,
            storage_bits=module.num_weights * choice.bits + 16 * module.d_out * choice.groups(module.d_in),
            cost_nats=draw_cost.random() * 4.0**-choice.bits,
        )
        for module in modules
        for choice in (Choice(bits=b, group_size=g) for b in (2, 3, 4, 8) for g in (32, -1))
    ]


@MANY
@given(st.integers(0, 2**32), st.integers(1, 6), st.floats(3.0, 9.0))
def test_fused_members_share_and_the_order_of_rows_changes_nothing(seed: int, num_groups: int, bits: float) -> None:
    source = random.Random(seed)
    modules = [
        linear(index, block=0, group=f"fused{index % num_groups}", d_out=8 * source.randint(1, 4))
        for index in range(2 * num_groups)
    ]
    rows = rows_of(modules, source)
    problem = build_problem(rows, budget=BudgetBits(bits=bits))
    plan = solve_exact(problem)
    for first, second in itertools.combinations(modules, 2):
        if first.fused_group == second.fused_group:
            assert plan.choices[first.name] == plan.choices[second.name]
    by_key = {(row.module.name, row.choice): row for row in rows}
    chosen = [by_key[module.name, plan.choices[module.name]] for module in modules]
    assert plan.storage_bits == sum(row.storage_bits for row in chosen)
    assert plan.cost_nats == pytest.approx(math.fsum(row.cost_nats for row in chosen), rel=1e-12)
    assert plan.average_bits <= bits
    shuffled = list(rows)
    source.shuffle(shuffled)
    assert build_problem(shuffled, budget=BudgetBits(bits=bits)) == problem


@MANY
@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(0, 10**6))
def test_the_smallest_budget_named_works_and_less_does_not(seed: int, blocks: int, fixed: int) -> None:
    source = random.Random(seed)
    modules = [linear(index, d_out=source.randint(1, 40)) for index in range(blocks)]
    rows = rows_of(modules, source)
    with pytest.raises(BudgetError, match="smallest possible") as of_bits:
        build_problem(rows, budget=BudgetBits(bits=0.5))
    named = float(re.search(r"smallest possible is (\S+) bits", str(of_bits.value))[1])
    problem = build_problem(rows, budget=BudgetBits(bits=named))
    with pytest.raises(BudgetError):
        build_problem(rows, budget=BudgetBits(bits=round(named - 1e-4, 4)))

    # to the bit
    tightest = Problem(groups=problem.groups, capacity_bits=problem.minimum_bits)
    for solve in (solve_exact, solve_lagrangian):
        assert solve(tightest).storage_bits == problem.minimum_bits
    with pytest.raises(BudgetError, match=str(problem.minimum_bits)):
        Problem(groups=problem.groups, capacity_bits=problem.minimum_bits - 1)

    # to the byte
    with pytest.raises(BudgetError, match="smallest possible") as of_bytes:
        build_problem(rows, budget=BudgetBytes(total_bytes=1, fixed_bytes=fixed))
    total = int(re.search(r"smallest possible is (\d+) bytes", str(of_bytes.value))[1])
    plan = solve_exact(build_problem(rows, budget=BudgetBytes(total_bytes=total, fixed_bytes=fixed)))
    assert fixed * 8 + plan.storage_bits <= total * 8
    with pytest.raises(BudgetError):
        build_problem(rows, budget=BudgetBytes(total_bytes=total - 1, fixed_bytes=fixed))
