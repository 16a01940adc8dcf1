"""From a measure of importance to a plan under a budget."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from lrpq.allocate.baselines import nearest_uniform, two_level
from lrpq.allocate.budget import BudgetBits
from lrpq.allocate.knapsack import PLAN_GAP, lower_bound, solve_exact
from lrpq.allocate.plan import Plan
from lrpq.allocate.problem import CostRow, Method, Problem, build_problem, plan_of
from lrpq.errors import BudgetError, ConfigError
from lrpq.model.layers import Choice


def by_costs(rows: Sequence[CostRow], *, budget_bits: float) -> Plan:
    """The optimum for these costs, to within PLAN_GAP."""
    return solve_exact(_problem(rows, budget_bits), relative_gap=PLAN_GAP)


def by_ranking(rows: Sequence[CostRow], scores: Mapping[str, float], *, budget_bits: float) -> Plan:
    """Two adjacent-but-one widths around the budget: the important modules at the wider, as many as fit.

    The published rankings choose between two widths. At a budget of n bits and scales these are n - 1 and n + 1.
    """
    low, high = levels({row.choice for row in rows if row.choice is not None}, budget_bits=budget_bits)
    return two_level(_problem(rows, budget_bits), scores, low=low, high=high)


def uniform(rows: Sequence[CostRow], *, budget_bits: float) -> Plan:
    """The uniform plan nearest to the budget."""
    smallest = min(budget_bits, 16.0)
    return nearest_uniform(_problem(rows, smallest), at_bits=budget_bits)


def chosen(rows: Sequence[CostRow], choices: Mapping[str, Choice | None], *, budget_bits: float) -> Plan:
    """The plan of these choices.

    Raises:
        BudgetError: they take more than the budget.
    """
    problem = _problem(rows, budget_bits)
    picks = [
        next(option for option in group.options if option.choice == choices[group.members[0].name])
        for group in problem.groups
    ]
    storage = sum(pick.storage_bits for pick in picks)
    if storage > problem.capacity_bits:
        raise BudgetError(f"the plan takes {storage} bits, {storage - problem.capacity_bits} more than its budget")
    bound = lower_bound(problem, capacity_bits=storage)
    return plan_of(problem, picks, method=Method.SEARCHED, bound_nats=bound, bound_bits=storage)


def capacity(rows: Sequence[CostRow], *, budget_bits: float) -> int:
    """Bits that all modules together may take."""
    return _problem(rows, budget_bits).capacity_bits


def levels(available: Collection[Choice], *, budget_bits: float) -> tuple[Choice, Choice]:
    """The widest choice below the budget's whole bits and the narrowest above them, of one group size.

    Raises:
        ConfigError: no two choices lie on both sides.
    """
    choices = sorted(available)
    size = max(choice.group_size for choice in choices)
    whole = int(budget_bits)
    below = [c for c in choices if c.group_size == size and c.bits < whole]
    above = [c for c in choices if c.group_size == size and c.bits > whole]
    if not below or not above:
        raise ConfigError(f"a ranking at {budget_bits:g} bits needs choices narrower and wider than {whole} bits")
    return below[-1], above[0]


def with_costs(rows: Sequence[CostRow], costs: Mapping[str, Mapping[Choice, float]]) -> list[CostRow]:
    """The same modules and sizes with other costs."""
    return [replace(row, cost_nats=costs[row.module.name][row.choice]) for row in rows if row.choice is not None]


def _problem(rows: Sequence[CostRow], budget_bits: float) -> Problem:
    """Every module for itself, as `lrpq compress` allocates where nothing fuses layers."""
    return build_problem(rows, budget=BudgetBits(bits=budget_bits), fused=False)
