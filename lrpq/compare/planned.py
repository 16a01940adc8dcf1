"""Plans that take more than costs of single modules: measured, searched or estimated again."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lrpq.allocate.cooperative import demote, shrunk
from lrpq.allocate.plan import Plan
from lrpq.allocate.problem import CostRow
from lrpq.allocate.swaps import Choices, with_swaps
from lrpq.compare import allocation
from lrpq.compare.codes import Codes
from lrpq.compare.recipes import DEFAULT, Recipe
from lrpq.compare.workbench import Gathered, Workbench
from lrpq.errors import ConfigError
from lrpq.importance.joint import joint_kl
from lrpq.importance.probe import PROBE_WINDOWS
from lrpq.importance.registry import MEASURES
from lrpq.importance.shapley import HIGH, LOW, Game, demotion_orders, progressive_demotion
from lrpq.model.layers import Choice
from lrpq.quant.grid import QuantizedWeight

REESTIMATED, COOPQ, SWAPS = "re-estimated", "coopq", "lrpq+swaps"
"""Names of the allocations."""
NUM_ORDERS = 8
"""Of demotion: four and their reverses."""
PLANS_AT_ONCE = 128
"""Measured in one pass: bounds the hidden states."""

Levels = tuple[int, int]
"""Narrow and wide width, bits a code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A plan, and what came with it."""

    plan: Plan
    codes: Codes | None = None
    """Of a method that quantizes before it allocates."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """What the method has to say of how it came about."""


def reestimated(bench: Workbench, gathered: Gathered, recipe: Recipe, first: Plan, budget: float) -> Planned:
    """A second plan from costs at the model that the first plan makes.

    A cost expands the divergence around the original, which under 3 bits is far away. Here gradients, curvature and
    Hessians are taken at the model with the first plan's codes, labels sampled from *its* softmax: the Gauss-Newton
    matrix of KL(original || quantized) at that point (the first-order term there is left out). dW stays the distance
    of candidates from the original weights. As in Post-quantization Integral (Hu et al. 2025, arXiv:2503.01901), which
    finds that sensitivities at the original do not hold at the quantized point.
    """
    codes = bench.codes(first.choices, recipe, gathered)
    name = DEFAULT.allocation
    again = bench.gather({name: MEASURES[name]}, weightings=(), candidates_by=DEFAULT.weighting, at=codes)
    plan = allocation.by_costs(again.costs[name], budget_bits=budget)
    changed = sum(first.choices[module] != choice for module, choice in plan.choices.items())
    return Planned(plan=plan, counts={"modules_changed": changed})


def level_pairs(available: Collection[int]) -> list[Levels]:
    """Widths two bits apart, narrowest first.

    Raises:
        ConfigError: there are none.
    """
    pairs = [(bits, bits + 2) for bits in sorted(available) if bits + 2 in available]
    if not pairs:
        shown = ", ".join(map(str, sorted(available)))
        raise ConfigError(f"blocks are demoted by two bits, but no two of the widths {shown} are that far apart")
    return pairs


def demotion_levels(rows: Sequence[CostRow], budget: float) -> Levels:
    """Two widths, two bits apart, around the budget: the first pair whose wider one takes more, or the last.

    One that takes just as much would leave nothing to decide: every block keeps it.
    """
    pairs = level_pairs({row.choice.bits for row in rows if row.choice is not None})
    num_weights = sum(spec.num_weights for spec in {row.module for row in rows})

    def all_wide(pair: Levels) -> float:
        return sum(row.storage_bits for row in _at_width(rows, pair[1]).values()) / num_weights

    return next((pair for pair in pairs if all_wide(pair) > budget), pairs[-1])


def demotion_game(bench: Workbench, gathered: Gathered, levels: Levels) -> Game:
    """Measure CoopQ's game between two widths on a few calibration windows, with the stored candidates."""
    stream, terms = bench.stream(), bench.terms
    rows = gathered.costs[DEFAULT.allocation]
    at_level = {key: _at_width(rows, bits) for key, bits in zip((LOW, HIGH), levels, strict=True)}

    def weights(block: int, key: Hashable) -> dict[str, Tensor]:
        chosen = at_level[str(key)]
        return {
            spec.name: _candidate(gathered, spec.name, chosen[spec.name].choice).dequantize(stream.dtype)
            for spec in stream.block_specs(block)
        }

    def payoffs(plans: Mapping[str, Sequence[Hashable]]) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        names = list(plans)
        for start in range(0, len(names), PLANS_AT_ONCE):
            part = {name: plans[name] for name in names[start : start + PLANS_AT_ONCE]}
            found |= joint_kl(stream, bench.tokens[:PROBE_WINDOWS], part, weights, micro_batch=terms.micro_batch)
        return found

    orders = demotion_orders(stream.num_blocks, NUM_ORDERS, seed=terms.seed)
    return progressive_demotion(stream.num_blocks, orders, payoffs)


def cooperative(rows: Sequence[CostRow], game: Game, levels: Levels, budget: float) -> Planned:
    """CoopQ's plan: every block at one of two widths."""
    low, high = (_at_width(rows, bits) for bits in levels)
    blocks = len(game.values)
    saved = [0] * blocks
    for name, row in high.items():
        saved[row.module.block] += row.storage_bits - low[name].storage_bits
    capacity = allocation.capacity(rows, budget_bits=budget)
    needed = sum(row.storage_bits for row in high.values()) - capacity
    found = demote(game.values, shrunk(game.covariance), saved, needed_bits=needed)
    chosen = {name: (low if found.low[row.module.block] else high)[name].choice for name, row in high.items()}
    counts = {"blocks_demoted": sum(found.low), "orders": game.num_orders, "stopped_early": int(found.stopped_early)}
    return Planned(plan=allocation.chosen(rows, chosen, budget_bits=budget), counts=counts)


def swapped(bench: Workbench, gathered: Gathered, plan: Plan, budget: float) -> Planned:
    """The plan after measured moves of bits between two modules (lrpq.allocate.swaps), stored candidates as codes.

    The caller has checked that windows are held out.
    """
    stream, rows, held_out = bench.stream(), gathered.costs[DEFAULT.allocation], bench.held_out
    assert held_out is not None
    choices = {name: choice for name, choice in plan.choices.items() if choice is not None}

    def key(block: int, of: Choices) -> Hashable:
        return tuple((spec.name, of[spec.name]) for spec in stream.block_specs(block) if spec.name in of)

    def weights(_: int, chosen: Hashable) -> dict[str, Tensor]:
        assert isinstance(chosen, tuple)
        return {name: _candidate(gathered, name, choice).dequantize(stream.dtype) for name, choice in chosen}

    def measure(plans: Sequence[Choices]) -> list[list[float]]:
        keys = {str(i): [key(block, of) for block in range(stream.num_blocks)] for i, of in enumerate(plans)}
        found = joint_kl(stream, held_out, keys, weights, micro_batch=bench.terms.micro_batch)
        return [found[str(i)] for i in range(len(plans))]

    found = with_swaps(rows, choices, measure)
    counts = {"swaps_tried": found.num_tried, "swaps_accepted": found.num_accepted}
    return Planned(plan=allocation.chosen(rows, found.choices, budget_bits=budget), counts=counts)


def _at_width(rows: Sequence[CostRow], bits: int) -> dict[str, CostRow]:
    """Of every module the row of this width, in the widest group that is no whole row, else of whole rows."""
    found: dict[str, CostRow] = {}
    for row in rows:
        if row.choice is not None and row.choice.bits == bits:
            known = found.get(row.module.name)
            if known is None or known.choice is None or row.choice.group_size > known.choice.group_size:
                found[row.module.name] = row
    return found


def _candidate(gathered: Gathered, name: str, choice: Choice | None) -> QuantizedWeight:
    return next(q for q in gathered.candidates[name] if q.choice == choice)
