"""Widths of weights and activations together, under a budget of bit operations.

A product of a weights and b activations bits counts a b for each of its multiplications:

    BOPs  =  sum over layers  MACs w a  +  sum over attention's two products  MACs a a'

which is what the partial products of an integer multiplier come to (Baskin et al. 2018, "UNIQ"; HAWQ-V3's constraint).
It is bilinear in the widths, but it falls apart into groups that share no width: a site with all layers that read it
(their inputs are quantized once), queries with keys, the pattern with values. All combinations of a group's widths are
its options, so the problem is a multiple-choice knapsack again and is solved exactly.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from lrpq.activations.attention import KEY, PATTERN, POINTS, QUERY, VALUE
from lrpq.activations.calibrate import Calibration
from lrpq.allocate.knapsack import exact_picks
from lrpq.allocate.options import Group, Option
from lrpq.allocate.problem import Problem
from lrpq.errors import BudgetError
from lrpq.model.layers import Choice, LinearSpec

PlaceCosts = Mapping[tuple[int, str, int], float]
"""(block, site or point, width) -> nats."""
ModuleCosts = Mapping[tuple[str, Choice], float]
"""(module, choice) -> nats."""
PRODUCTS = ((QUERY, KEY), (PATTERN, VALUE))


@dataclass(frozen=True, slots=True, kw_only=True)
class Widths:
    """What is chosen for all places and modules."""

    places: Mapping[tuple[int, str], int]
    modules: Mapping[str, Choice]
    spent: int
    """Of the budget, in its unit."""
    cost_nats: float
    bound_nats: float
    """Nothing within the budget costs less."""
    binding: bool
    """Whether more of it could lower the cost."""
    stopped_early: bool
    """The solver met its time limit before its gap."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Combination(Option):
    """Of a group's widths; its storage are bit operations."""

    places: tuple[tuple[tuple[int, str], int], ...] = field(default=())
    modules: tuple[tuple[str, Choice], ...] = field(default=())


def operations(
    calibration: Calibration,
    specs: Sequence[LinearSpec],
    places: Mapping[tuple[int, str], int],
    modules: Mapping[str, int],
) -> int:
    """Bit operations an image of widths by place and by module."""
    linear = sum(
        _linear_macs(calibration, spec) * modules[spec.name] * places[spec.block, spec.input_site] for spec in specs
    )
    inside = sum(
        _product_macs(calibration, block, pair) * places[block, pair[0]] * places[block, pair[1]]
        for block, pair in _products(calibration)
    )
    return linear + inside


def even_operations(
    calibration: Calibration, specs: Sequence[LinearSpec], *, weight_bits: float, activation_bits: int
) -> int:
    """The same with one width for all weights, which may be a fraction of a bit, and one for all activations."""
    linear = sum(_linear_macs(calibration, spec) for spec in specs)
    inside = sum(_product_macs(calibration, block, pair) for block, pair in _products(calibration))
    weights = math.floor(Fraction(repr(float(weight_bits))) * linear)
    return activation_bits * weights + activation_bits**2 * inside


def allocate_operations(
    calibration: Calibration,
    specs: Sequence[LinearSpec],
    place_costs: PlaceCosts,
    module_costs: ModuleCosts,
    *,
    budget: int,
) -> Widths:
    """The widths of least cost within a budget of bit operations an image.

    Args:
        calibration: the places.
        specs: the layers; the site of each is a place, and one that none of them reads costs no operations.
        place_costs: of every place and width.
        module_costs: of every module and choice, on the scale of the places'.
        budget: bit operations.

    Raises:
        BudgetError: no combination of widths takes so little; the least is named.
        QuantizationError: the solver fails.
    """
    widths = _by_place(place_costs)
    choices: dict[str, list[Choice]] = {}
    for name, choice in module_costs:
        choices.setdefault(name, []).append(choice)
    sites: dict[tuple[int, str], list[LinearSpec]] = {key: [] for key in calibration.places if key[1] not in POINTS}
    for spec in specs:
        sites[spec.block, spec.input_site].append(spec)
    groups = [
        Group(
            name=f"{key[0]}.{key[1]}",
            members=tuple(members),
            options=tuple(_site_options(calibration, key, members, widths[key], choices, place_costs, module_costs)),
        )
        for key, members in sites.items()
    ]
    groups += [
        Group(
            name=f"{block}.{'.'.join(pair)}",
            members=(),
            options=tuple(_product_options(calibration, block, pair, widths, place_costs)),
        )
        for block, pair in _products(calibration)
    ]
    least = sum(min(option.storage_bits for option in group.options) for group in groups)
    if budget < least:
        raise BudgetError(f"{budget} bit operations an image are too few for these widths; the least is {least}")
    found = exact_picks(Problem(groups=tuple(groups), capacity_bits=budget))
    picks = [pick for pick in found.options if isinstance(pick, _Combination)]
    chosen_at = dict(chosen for pick in picks for chosen in pick.places)
    return Widths(
        places={key: chosen_at[key] for key in calibration.places},
        modules=dict(chosen for pick in picks for chosen in pick.modules),
        spent=sum(pick.storage_bits for pick in picks),
        cost_nats=math.fsum(pick.cost_nats for pick in picks),
        bound_nats=found.bound_nats,
        binding=is_binding(groups, found.options),
        stopped_early=found.stopped_early,
    )


def is_binding(groups: Sequence[Group], picks: Sequence[Option]) -> bool:
    """Whether a group has an option that costs less than the one picked."""
    return any(pick.cost_nats > min(o.cost_nats for o in g.options) for g, pick in zip(groups, picks, strict=True))


def _site_options(
    calibration: Calibration,
    key: tuple[int, str],
    members: Sequence[LinearSpec],
    widths: Sequence[int],
    choices: Mapping[str, Sequence[Choice]],
    place_costs: PlaceCosts,
    module_costs: ModuleCosts,
) -> list[_Combination]:
    macs = [_linear_macs(calibration, spec) for spec in members]
    found = []
    for width in widths:
        for combination in itertools.product(*(choices[spec.name] for spec in members)):
            named = [(spec.name, choice) for spec, choice in zip(members, combination, strict=True)]
            found.append(
                _Combination(
                    choice=None,
                    storage_bits=sum(m * choice.bits * width for m, choice in zip(macs, combination, strict=True)),
                    cost_nats=place_costs[*key, width] + math.fsum(module_costs[pair] for pair in named),
                    places=((key, width),),
                    modules=tuple(named),
                )
            )
    return found


def _product_options(
    calibration: Calibration,
    block: int,
    pair: tuple[str, str],
    widths: Mapping[tuple[int, str], Sequence[int]],
    place_costs: PlaceCosts,
) -> list[_Combination]:
    macs, (left, right) = _product_macs(calibration, block, pair), pair
    return [
        _Combination(
            choice=None,
            storage_bits=macs * a * b,
            cost_nats=place_costs[block, left, a] + place_costs[block, right, b],
            places=(((block, left), a), ((block, right), b)),
        )
        for a in widths[block, left]
        for b in widths[block, right]
    ]


def _by_place(costs: PlaceCosts) -> dict[tuple[int, str], list[int]]:
    found: dict[tuple[int, str], list[int]] = {}
    for block, name, width in costs:
        found.setdefault((block, name), []).append(width)
    return found


def _products(calibration: Calibration) -> list[tuple[int, tuple[str, str]]]:
    blocks = dict.fromkeys(block for block, _ in calibration.places)
    return [(block, pair) for block in blocks for pair in PRODUCTS if (block, pair[0]) in calibration.places]


def _linear_macs(calibration: Calibration, spec: LinearSpec) -> int:
    return calibration.places[spec.block, spec.input_site].num_values * spec.d_out


def _product_macs(calibration: Calibration, block: int, pair: tuple[str, str]) -> int:
    """A row of the one for every value of the other: Q K^T is as large as a pattern, P V as the values."""
    left, right = (calibration.places[block, name] for name in pair)
    if pair == (QUERY, KEY):
        return left.num_values * calibration.places[block, PATTERN].row
    return left.num_values * right.row
