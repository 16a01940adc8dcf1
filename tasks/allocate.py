"""Allocate: from the stored costs to a choice for every module under the budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lrpq.allocate.baselines import nearest_uniform
from lrpq.allocate.budget import Budget
from lrpq.allocate.keep import parse_keep
from lrpq.allocate.knapsack import solve_exact, solve_lagrangian
from lrpq.allocate.plan import Plan
from lrpq.allocate.problem import CostRow, Problem, build_problem
from lrpq.allocate.targets import Target
from lrpq.model.layers import Choice, LinearSpec

SOLVERS = {"exact": solve_exact, "lagrangian": solve_lagrangian}


def cost_rows(rows: Iterable[Mapping[str, Any]], specs: Sequence[LinearSpec]) -> list[CostRow]:
    """Stored cost rows as the allocation wants them."""
    by_name = {spec.name: spec for spec in specs}
    return [
        CostRow(
            module=by_name[row["name"]],
            choice=Choice(bits=row["bits"], group_size=row["group_size"]),
            storage_bits=row["storage_bits"],
            cost_nats=row["cost_nats"],
        )
        for row in rows
    ]


def pose(
    rows: Sequence[CostRow], *, budget: Budget, keep: Sequence[str], target: str, tensor_parallel: int
) -> Problem:
    """The allocation problem of a plan's configuration."""
    return build_problem(
        rows,
        budget=budget,
        keep=[parse_keep(rule) for rule in keep],
        target=Target(target),
        tensor_parallel=tensor_parallel,
    )


def solve(problem: Problem, *, solver: str) -> Plan:
    """Solve with the named solver."""
    return SOLVERS[solver](problem)


def control(problem: Problem, *, at_bits: float) -> Plan:
    """Uniform widths nearest to the bits that were reached."""
    return nearest_uniform(problem, at_bits=at_bits)
