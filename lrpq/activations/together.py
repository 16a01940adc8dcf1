"""One knapsack for the widths of all weights and activations of a classifier, under one budget.

The budget is what BITS a weight and b bits an activation take everywhere, in one of two units:

    bits         of layers' codes and scales, and of an image's activations: what is read for one image, once
    operations   bit operations an image (operations)

So a layer pays with its bits for what an activation needs more urgently, and the other way round. Costs of both must be
on one scale, which those of lrpq.activations.directional are.
"""

from __future__ import annotations

import math
from enum import Enum
from fractions import Fraction

from lrpq.activations.calibrate import Calibration
from lrpq.activations.operations import (
    ModuleCosts,
    PlaceCosts,
    Widths,
    allocate_operations,
    even_operations,
    is_binding,
    operations,
)
from lrpq.allocate.budget import SHOWN_DECIMALS
from lrpq.allocate.knapsack import exact_picks
from lrpq.allocate.options import Group, Option
from lrpq.allocate.problem import Problem
from lrpq.errors import BudgetError
from lrpq.model.layers import Choice


class Unit(Enum):
    """Of a budget that weights and activations share."""

    BITS = "bits"
    OPERATIONS = "operations"


def even_spending(
    calibration: Calibration, problem: Problem, unit: Unit, *, weight_bits: float, activation_bits: int
) -> int:
    """What so many bits a weight and an activation take everywhere.

    Args:
        calibration: the places.
        problem: the layers in the allocation; those left at 16 bits count nowhere.
        unit: bits, or bit operations an image.
        weight_bits: all-in bits a weight, read as the decimal number the user wrote; in bit operations, where scales
            multiply nothing, bits of the codes.
        activation_bits: of every activation.
    """
    if unit is Unit.OPERATIONS:
        specs = [spec for group in problem.groups for spec in group.members]
        return even_operations(calibration, specs, weight_bits=weight_bits, activation_bits=activation_bits)
    values = sum(place.num_values for place in calibration.places.values())
    return math.floor(Fraction(repr(float(weight_bits))) * problem.num_weights) + activation_bits * values


def check_budget(
    calibration: Calibration, problem: Problem, unit: Unit, *, weight_bits: float, activation_bits: int
) -> None:
    """Refuse a budget below what the narrowest widths take, before anything is known of costs.

    Args:
        calibration: the places and their widths.
        problem: the layers' options; costs and capacity are not looked at.
        unit: of the budget.
        weight_bits: that the budget has for every weight.
        activation_bits: that it has for every activation.

    Raises:
        BudgetError: with the smallest ``weight_bits`` possible, rounded up, so that it works as it stands.
    """
    places = {key: min(place.candidates) for key, place in calibration.places.items()}
    if unit is Unit.BITS:
        least = problem.minimum_bits + sum(places[key] * p.num_values for key, p in calibration.places.items())
    else:
        specs = [spec for group in problem.groups for spec in group.members]
        modules = {
            spec.name: min(option.choice.bits for option in group.options if option.choice is not None)
            for group in problem.groups
            for spec in group.members
        }
        least = operations(calibration, specs, places, modules)

    def spent(bits: float) -> int:
        return even_spending(calibration, problem, unit, weight_bits=bits, activation_bits=activation_bits)

    if spent(weight_bits) >= least:
        return
    scale = 10**SHOWN_DECIMALS
    smallest = math.ceil(Fraction((least - spent(0.0)) * scale, spent(1.0) - spent(0.0)))
    raise BudgetError(
        f"budget of {weight_bits:g} bits is impossible with these widths of weights and activations together; the "
        f"smallest possible is {smallest // scale}.{smallest % scale:0{SHOWN_DECIMALS}d} bits; raise --budget or allow "
        "narrower widths"
    )


def allocate_together(
    calibration: Calibration, problem: Problem, place_costs: PlaceCosts, unit: Unit, *, budget: int
) -> Widths:
    """All widths of least cost within the budget.

    Args:
        calibration: the places.
        problem: the layers' options with their costs; its own capacity bounds nothing here.
        place_costs: of every place and width, on the scale of the layers'.
        unit: of the budget.
        budget: bits, or bit operations an image.

    Raises:
        BudgetError: no widths take so little; the least is named.
        QuantizationError: the solver fails.
    """
    if unit is Unit.OPERATIONS:
        specs = [spec for group in problem.groups for spec in group.members]
        return allocate_operations(calibration, specs, place_costs, _module_costs(problem), budget=budget)
    places = [
        Group(
            name=f"{block}.{name}",
            members=(),
            options=tuple(
                Option(choice=None, storage_bits=width * place.num_values, cost_nats=place_costs[block, name, width])
                for width in place.candidates
            ),
        )
        for (block, name), place in calibration.places.items()
    ]
    groups = (*places, *problem.groups)
    least = sum(min(option.storage_bits for option in group.options) for group in groups)
    if budget < least:
        raise BudgetError(
            f"{budget} bits for weights and activations are too few for these widths; the least is {least}"
        )
    found = exact_picks(Problem(groups=groups, capacity_bits=budget))
    of_places, of_layers = found.options[: len(places)], found.options[len(places) :]
    return Widths(
        places={
            key: option.storage_bits // place.num_values
            for (key, place), option in zip(calibration.places.items(), of_places, strict=True)
        },
        modules={
            member.name: option.choice
            for group, option in zip(problem.groups, of_layers, strict=True)
            for member in group.members
            if option.choice is not None
        },
        spent=sum(pick.storage_bits for pick in found.options),
        cost_nats=math.fsum(pick.cost_nats for pick in found.options),
        bound_nats=found.bound_nats,
        binding=is_binding(groups, found.options),
        stopped_early=found.stopped_early,
    )


def _module_costs(problem: Problem) -> ModuleCosts:
    """Of layers for themselves: nothing fuses those of a classifier."""
    found: dict[tuple[str, Choice], float] = {}
    for group in problem.groups:
        (member,) = group.members
        for option in group.options:
            if option.choice is not None:
                found[member.name, option.choice] = option.cost_nats
    return found
