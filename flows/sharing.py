"""One budget of weights and activations: the stage that puts their costs on one scale, and the knapsack.

What a layer costs is known of a folded model, and what is folded depends on the widths of activations. So costs are
taken in the model that is folded for the middle width everywhere; the widths chosen by them make another one, in which
everything further is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from flows.planning import Planner
from flows.run import Run
from flows.stages import each_call
from lrpq.activations.calibrate import Calibration
from lrpq.activations.operations import Widths
from lrpq.activations.together import Unit, allocate_together, check_budget, even_spending
from lrpq.allocate.baselines import widest_uniform
from lrpq.allocate.budget import UNQUANTIZED_BITS
from lrpq.allocate.plan import Plan
from lrpq.allocate.problem import CostRow
from lrpq.errors import BudgetError
from lrpq.model.layers import Choice
from tasks import allocate, responses
from tasks.candidates import CandidatesJob
from tasks.cluster import Pool
from tasks.responses import ResponsesJob


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """What was decided together."""

    unit: Unit
    budget: int
    """Bits, or bit operations an image."""
    widths: Widths
    even: Even | None
    """The budget spent evenly; None where no uniform plan fits."""
    even_codes: CandidatesJob
    """Where the codes of the even plan are."""
    rows: list[dict[str, Any]]
    """Cost rows of these candidates, as they are stored."""

    @property
    def gap(self) -> float:
        """(cost - bound) / cost of the widths."""
        cost = self.widths.cost_nats
        return (cost - self.widths.bound_nats) / cost if cost > 0 else 0.0

    def document(self, *, even: bool) -> dict[str, Any]:
        """For the manifest, of the widths that are written; what even ones cost together nobody has asked."""
        found: dict[str, Any] = {"unit": self.unit.value, "budget": self.budget}
        if even:
            assert self.even is not None
            return found | {"spent": self.even.spent}
        widths = self.widths
        return found | {"spent": widths.spent, "cost_nats": widths.cost_nats, "bound_nats": widths.bound_nats}


@dataclass(frozen=True, slots=True, kw_only=True)
class Even:
    """The widest width of weights that the budget has room for everywhere, beside activations of the middle one."""

    plan: Plan
    spent: int
    """Of the shared budget."""


def check_share(planner: Planner, calibration: Calibration, choices: Sequence[Choice], *, activation_bits: int) -> None:
    """Refuse an impossible budget before anything is computed for it.

    Args:
        planner: of the model; its budget is that of a weight.
        calibration: grids of all widths.
        choices: of every layer.
        activation_bits: the middle width.

    Raises:
        BudgetError: with the smallest possible.
    """
    rows = allocate.rows_without_costs(planner.specs, choices)
    problem = planner.pose(rows, budget_bits=UNQUANTIZED_BITS).problem
    weight_bits = planner.wanted.budget_bits
    assert weight_bits is not None
    unit = Unit(planner.wanted.share)
    check_budget(calibration, problem, unit, weight_bits=weight_bits, activation_bits=activation_bits)


def run_responses(run: Run, pool: Pool, job: ResponsesJob) -> None:
    """What everything costs; one task a draw. Draws already in the store are not redone."""
    label = responses.STAGE
    if run.stored(job.folder, label) is not None:
        return
    run.survive(pool, label, lambda: _respond(run, pool, job))
    run.finish(job.folder, label, {})


def _respond(run: Run, pool: Pool, job: ResponsesJob) -> None:
    calls = [(job, draw) for draw in responses.missing_draws(job)]
    each_call(run, pool, responses.respond, calls, label=responses.STAGE, unit="draw")


def share(
    planner: Planner,
    calibration: Calibration,
    stored: list[dict[str, Any]],
    job: ResponsesJob,
    *,
    activation_bits: int,
) -> Shared:
    """All widths, from what is stored.

    Args:
        planner: of the model folded for the middle width; its budget is that of the weights.
        calibration: grids of all widths.
        stored: cost rows of the candidates, whose costs are not looked at.
        job: the complete stage.
        activation_bits: the middle width.

    Raises:
        BudgetError: no widths take so little; the least is named.
    """
    rows = planner.cost_rows(stored)
    costs = responses.read_responses(job)
    on_scale = [
        replace(row, cost_nats=costs.modules[row.module.name, row.choice]) for row in rows if row.choice is not None
    ]
    problem = planner.pose(on_scale, budget_bits=UNQUANTIZED_BITS).problem
    unit, weight_bits = Unit(planner.wanted.share), planner.wanted.budget_bits
    assert weight_bits is not None
    budget = even_spending(calibration, problem, unit, weight_bits=weight_bits, activation_bits=activation_bits)
    widths = allocate_together(calibration, problem, costs.places, unit, budget=budget)
    plan = _even(planner, rows, unit)
    even: Even | None = None
    if plan is not None:
        in_unit = plan.average_bits if unit is Unit.BITS else _code_bits(plan)
        spent = even_spending(calibration, problem, unit, weight_bits=in_unit, activation_bits=activation_bits)
        even = Even(plan=plan, spent=spent)
    return Shared(unit=unit, budget=budget, widths=widths, even=even, even_codes=job.candidates, rows=stored)


def _code_bits(plan: Plan) -> int:
    """The one width of a uniform plan."""
    return next(choice.bits for choice in plan.choices.values() if choice is not None)


def _even(planner: Planner, rows: list[CostRow], unit: Unit) -> Plan | None:
    """Weights of the widest width that the budget has room for everywhere, beside activations of the middle one."""
    asked = planner.wanted.budget_bits
    assert asked is not None
    try:
        problem = planner.pose(rows, budget_bits=UNQUANTIZED_BITS if unit is Unit.OPERATIONS else None).problem
    except BudgetError:  # the narrowest weights take more: they have it from activations below the middle width
        return None
    if unit is Unit.OPERATIONS:  # which scales take no part in
        return widest_uniform(problem, code_bits=asked)
    return allocate.uniform_within(problem, planner.source, total_bytes=None, format=planner.wanted.format)
