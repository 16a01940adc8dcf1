"""Mixed widths of a classifier's weights and activations by directional costs (lrpq.activations.directional).

Costs of weights need codes, codes a folded model, folding the widths of activations. So costs are taken with everything
folded for the middle width; grids of other widths are carried over to that model, where their codes are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from lrpq.activations.allocate import allocate_widths
from lrpq.activations.calibrate import Calibration
from lrpq.activations.directional import DRAWS, averaged, responses
from lrpq.activations.together import Unit, allocate_together, even_spending
from lrpq.allocate.budget import BudgetBits
from lrpq.allocate.plan import Plan
from lrpq.allocate.problem import build_problem
from lrpq.compare import allocation
from lrpq.compare.recipes import DEFAULT, Recipe
from lrpq.compare.workbench import Gathered, Workbench
from lrpq.errors import ConfigError
from lrpq.importance.registry import MEASURES
from lrpq.model.layers import Choice

UNLIMITED_BITS = 16.0


class WidthBudget(Enum):
    """What mixed widths may take, and by which costs they are chosen."""

    APART = "apart"
    """Weights and activations each their average; costs a token, its neighbours and outputs apart."""
    AVERAGES = "averages"
    """Weights and activations each their average; directional costs."""
    BITS = "bits"
    """All widths in one program, with no more bits an image than the averages everywhere; directional costs. With one
    width of activations there is nothing to share, and it is APART."""
    OPERATIONS = "operations"
    """The same with no more bit operations."""
    CONTRIBUTION = "contribution"
    """Weights and activations each their average, by LRP-QViT's contribution scores instead of costs (contribution)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocated:
    """Widths of everything."""

    widths: Mapping[tuple[int, str], int]
    """(block, site or point) -> width of its activations."""
    plan: Plan
    """Of the weights."""
    gathered: Gathered
    """What codes are made with; gradients at outputs are the same however the model is folded."""


def allocate_directional(
    bench: Workbench,
    calibration: Calibration | None,
    recipe: Recipe,
    *,
    budget: WidthBudget,
    average_bits: int,
    budget_bits: float,
    middle: int,
) -> Allocated:
    """Allocate by directional costs.

    Args:
        bench: the model, folded for the middle width everywhere, and the widths of its weights.
        calibration: of the model before it was folded; None where activations stay as they are.
        recipe: how codes are made.
        budget: AVERAGES, BITS or OPERATIONS.
        average_bits: of weights, in bit operations.
        budget_bits: of weights, all-in.
        middle: width that the budget has for every activation.

    Raises:
        ConfigError: the recipe ranks layers instead of asking what they cost, or one budget for all where activations
            stay as they are.
    """
    if recipe.allocation != DEFAULT.allocation:
        raise ConfigError(
            f"a budget of {budget.value} is allocated by costs, not by {recipe.allocation!r}; use it with "
            f"{DEFAULT.allocation!r}"
        )
    stream = bench.stream()
    gathered = bench.gather(
        {recipe.allocation: MEASURES[recipe.allocation]},
        weightings=[recipe.weighting],
        candidates_by=DEFAULT.weighting,
        keep_candidates=True,
        with_outputs=recipe.row_blocks > 1,
    )
    grids = {} if calibration is None else calibration.grids_on_folded(calibration.uniform(middle))
    costs = averaged(
        [
            responses(
                stream,
                bench.tokens,
                grids,
                gathered.candidates,
                seed=bench.terms.seed,
                draws=[draw],
                micro_batch=bench.terms.micro_batch,
            ).costs()
            for draw in range(DRAWS)
        ]
    )
    places, modules = costs.places, costs.modules
    rows = allocation.with_costs(gathered.costs[recipe.allocation], _by_module(modules))
    if budget is not WidthBudget.AVERAGES:
        if calibration is None:
            raise ConfigError(f"a budget of {budget.value} is one of weights and activations; give widths for both")
        unit = Unit(budget.value)
        weight_bits = budget_bits if unit is Unit.BITS else float(average_bits)
        problem = build_problem(rows, budget=BudgetBits(bits=UNLIMITED_BITS), fused=False)
        limit = even_spending(calibration, problem, unit, weight_bits=weight_bits, activation_bits=middle)
        chosen = allocate_together(calibration, problem, places, unit, budget=limit)
        plan = allocation.chosen(rows, chosen.modules, budget_bits=UNLIMITED_BITS)
        return Allocated(widths=chosen.places, plan=plan, gathered=gathered)
    widths = {} if calibration is None else allocate_widths(calibration, average_bits=middle, costs=places)
    return Allocated(widths=widths, plan=allocation.by_costs(rows, budget_bits=budget_bits), gathered=gathered)


def _by_module(costs: Mapping[tuple[str, Choice], float]) -> dict[str, dict[Choice, float]]:
    found: dict[str, dict[Choice, float]] = {}
    for (name, choice), cost in costs.items():
        found.setdefault(name, {})[choice] = cost
    return found


def middle_width(activation_bits: Sequence[int]) -> int:
    """The width that activations average to.

    Raises:
        ConfigError: an even number of widths, which has no middle.
    """
    ordered = sorted(activation_bits)
    if len(ordered) % 2 == 0:
        shown = ", ".join(map(str, ordered))
        raise ConfigError(f"activations of {shown} bits have no middle width to average to: give an odd number")
    return ordered[len(ordered) // 2]
