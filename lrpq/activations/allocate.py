"""Mixed widths of activations: the exact allocation of the weights, over places instead of layers.

A place's size is its activations an image. Its cost is what its best grid of a width is judged to cost, in nats a
token, or its directional cost (directional). Widths average to the budget over all activations of an image.
"""

from __future__ import annotations

from collections.abc import Mapping

from lrpq.activations.calibrate import Calibration
from lrpq.allocate.budget import BudgetBits
from lrpq.allocate.knapsack import solve_exact
from lrpq.allocate.problem import CostRow, build_problem
from lrpq.model.layers import Choice, LinearSpec


def allocate_widths(
    calibration: Calibration, *, average_bits: float, costs: Mapping[tuple[int, str, int], float] | None = None
) -> dict[tuple[int, str], int]:
    """Width of every place, of least cost.

    Args:
        calibration: places and their candidates.
        average_bits: budget.
        costs: (block, place, width) -> cost; by default the candidates'.

    Raises:
        BudgetError: the budget is below the narrowest widths.
    """
    rows: list[CostRow] = []
    for (block, name), place in calibration.places.items():
        spec = LinearSpec(  # a row of as many values as the place has
            name=f"{block}.{name}",
            block=block,
            d_out=1,
            d_in=place.num_values,
            input_site=name,
            fused_group=f"{block}.{name}",
        )
        for width, candidate in place.candidates.items():
            choice = Choice(bits=width, group_size=-1)
            bits = width * place.num_values
            cost = candidate.cost if costs is None else costs[block, name, width]
            rows.append(CostRow(module=spec, choice=choice, storage_bits=bits, cost_nats=cost))
    plan = solve_exact(build_problem(rows, budget=BudgetBits(bits=average_bits), fused=False))
    found: dict[tuple[int, str], int] = {}
    for block, name in calibration.places:
        choice_of = plan.choices[f"{block}.{name}"]
        assert choice_of is not None
        found[block, name] = choice_of.bits
    return found
