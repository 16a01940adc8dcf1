"""A workbench with what its methods need to know: costs under every wanted allocation, token weights, plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lrpq.allocate.plan import Plan
from lrpq.allocate.problem import CostRow
from lrpq.allocate.trellis import with_trellis_codes
from lrpq.allocate.wide import with_wide_scales
from lrpq.checkpoint.formats import CheckpointFormat
from lrpq.checkpoint.plan import planned_size
from lrpq.compare import allocation
from lrpq.compare import planned as searching
from lrpq.compare.fast import fast_codes
from lrpq.compare.methods import DIRECTIONAL, EQUAL_LOSS, NOISE, ONE_AT_A_TIME
from lrpq.compare.planned import COOPQ, SWAPS, Planned
from lrpq.compare.recipes import DEFAULT, FAST, Recipe
from lrpq.compare.workbench import Workbench
from lrpq.errors import ConfigError
from lrpq.importance.asked import Asked, asked_by
from lrpq.importance.directional import directional_costs
from lrpq.importance.equal_loss import equal_loss
from lrpq.importance.measured import filled, noise_factors, one_at_a_time, relative_error
from lrpq.importance.probe import PROBE_WINDOWS
from lrpq.importance.registry import MEASURES, Measure
from lrpq.importance.shapley import Game
from lrpq.model.layers import Choice, LinearSpec

MEASURED_BITS = (2, 3, 4)
"""Widths that are measured; wider ones follow the estimate, scaled to meet the widest measured."""


class Prepared:
    """Args:
    bench: model, tokens and terms.
    recipes: what will be asked of it.
    budgets: at which all-in bits.
    """

    def __init__(self, bench: Workbench, recipes: Sequence[Recipe], budgets: Sequence[float]) -> None:
        self.bench = bench
        allocations = {recipe.allocation for recipe in recipes}
        self.gathered = bench.gather(
            _measures(allocations, budgets),
            weightings=_weightings(recipes),
            candidates_by=DEFAULT.weighting,
            keep_candidates=bool(allocations & {ONE_AT_A_TIME, DIRECTIONAL, COOPQ, SWAPS}),
            with_outputs=_with_outputs(recipes),
        )
        self.costs: dict[str, list[CostRow]] = dict(self.gathered.costs)
        if NOISE in allocations:
            self.costs[NOISE] = self._noise_costs()
        if ONE_AT_A_TIME in allocations:
            self.costs[ONE_AT_A_TIME] = self._measured_costs()
        if DIRECTIONAL in allocations:
            self.costs[DIRECTIONAL] = self._directional_costs()
        self.games: dict[searching.Levels, Game] = {}
        """CoopQ's, by the widths that they are played between."""
        if COOPQ in allocations:
            ours = self.gathered.costs[DEFAULT.allocation]
            for levels in sorted({searching.demotion_levels(ours, budget) for budget in budgets}):
                self.games[levels] = searching.demotion_game(bench, self.gathered, levels)

    def planned(self, recipe: Recipe, budget: float) -> Planned:
        """The plan of a recipe; of a method that looks for evidence of its own, after it has found it."""
        ours = self.gathered.costs[DEFAULT.allocation]
        match recipe.allocation:
            case FAST.allocation:
                found = fast_codes(
                    self.bench, lambda rows: allocation.by_costs(self._coded(rows, recipe), budget_bits=budget)
                )
                return Planned(plan=found.plan, codes=found.codes)
            case searching.REESTIMATED:
                first = self.plan(DEFAULT.allocation, budget)
                return searching.reestimated(self.bench, self.gathered, recipe, first, budget)
            case searching.COOPQ:
                levels = searching.demotion_levels(ours, budget)
                return searching.cooperative(ours, self.games[levels], levels, budget)
            case searching.SWAPS:
                return searching.swapped(self.bench, self.gathered, self.plan(DEFAULT.allocation, budget), budget)
            case name:
                return Planned(plan=self.plan(name, budget, recipe))

    def plan(self, name: str, budget: float, recipe: Recipe = DEFAULT) -> Plan:
        """The plan of an allocation, by its name; scales and grids are the recipe's or as the terms have them."""
        ours = self._rows(DEFAULT.allocation, recipe)
        if name == "uniform":
            return allocation.uniform(ours, budget_bits=budget)
        if name in self.gathered.scores:
            return allocation.by_ranking(ours, self.gathered.scores[name], budget_bits=budget)
        return allocation.by_costs(self._rows(_key(name, budget), recipe), budget_bits=budget)

    def _rows(self, name: str, recipe: Recipe) -> list[CostRow]:
        rows = with_wide_scales(self.costs[name]) if recipe.wide_scales else self.costs[name]
        return self._coded(rows, recipe)

    def _coded(self, rows: Sequence[CostRow], recipe: Recipe) -> list[CostRow]:
        """Rows of uniform candidates with the recipe's kind of codes."""
        return with_trellis_codes(rows) if self.bench.terms.trellis and not recipe.uniform_codes else list(rows)

    def predicted_nats(self, plan: Plan) -> float:
        """The plan under lrpq's own costs, whatever chose it; those of the same widths where its scales are wider or
        its grids uniform."""
        ours = {
            (row.module.name, choice): row.cost_nats
            for wide in (False, True)
            for uniform in (False, True)
            for row in self._rows(DEFAULT.allocation, replace(DEFAULT, wide_scales=wide, uniform_codes=uniform))
            if (choice := row.choice) is not None
        }
        return sum(ours[module, choice] for module, choice in plan.choices.items() if choice is not None)

    @property
    def specs(self) -> list[LinearSpec]:
        """The layers that are quantized."""
        return list(dict.fromkeys(row.module for row in self.gathered.costs[DEFAULT.allocation]))

    def checkpoint_bytes(self, plan: Plan) -> int:
        """Bytes of the weight files of a checkpoint with this plan."""
        chosen = {name: choice for name, choice in plan.choices.items() if choice is not None}
        trellis = any(choice.trellis for choice in chosen.values())
        written_as = CheckpointFormat.TRELLIS if trellis else CheckpointFormat.COMPRESSED_TENSORS
        size = planned_size(self.bench.source, chosen, specs=self.specs, format=written_as)
        return size.total_bytes

    def _noise_costs(self) -> list[CostRow]:
        terms = self.bench.terms
        factors = noise_factors(
            self.bench.stream(), self.bench.tokens[:PROBE_WINDOWS], seed=terms.seed, micro_batch=terms.micro_batch
        )
        rows = self.gathered.costs[NOISE]
        costs: dict[str, dict[Choice, float]] = {}
        for row in rows:
            if row.choice is not None:
                costs.setdefault(row.module.name, {})[row.choice] = factors[row.module.name] * row.cost_nats
        return allocation.with_costs(rows, costs)

    def _directional_costs(self) -> list[CostRow]:
        bench = self.bench
        costs = directional_costs(
            bench.stream(),
            bench.tokens,
            lambda spec: self.gathered.candidates[spec.name],
            seed=bench.terms.seed,
            micro_batch=bench.terms.micro_batch,
        )
        return allocation.with_costs(self.gathered.costs[DEFAULT.allocation], costs)

    def _measured_costs(self) -> list[CostRow]:
        terms = self.bench.terms
        chosen = [choice for choice in terms.choices if choice.bits in MEASURED_BITS]
        if not chosen:
            raise ConfigError(f"measured costs need one of the widths {', '.join(map(str, MEASURED_BITS))}")
        measured = one_at_a_time(
            self.bench.stream(),
            self.bench.tokens[:PROBE_WINDOWS],
            lambda spec: self.gathered.candidates[spec.name],
            chosen,
            micro_batch=terms.micro_batch,
        )
        rows = self.gathered.costs[DEFAULT.allocation]
        estimated: dict[str, dict[Choice, float]] = {}
        for row in rows:
            if row.choice is not None:
                estimated.setdefault(row.module.name, {})[row.choice] = row.cost_nats
        return allocation.with_costs(rows, filled(measured, estimated))


def asked_of(recipes: Sequence[Recipe], budgets: Sequence[float]) -> Asked:
    """What the walk is asked for that prepares these."""
    measures = _measures({recipe.allocation for recipe in recipes}, budgets)
    return asked_by(
        measures, _weightings(recipes), candidates_by=DEFAULT.weighting, with_outputs=_with_outputs(recipes)
    )


def _weightings(recipes: Sequence[Recipe]) -> list[str]:
    return sorted({recipe.weighting for recipe in recipes})


def _with_outputs(recipes: Sequence[Recipe]) -> bool:
    return any(recipe.row_blocks > 1 for recipe in recipes)


def _measures(allocations: set[str], budgets: Sequence[float]) -> dict[str, Measure]:
    found = {name: MEASURES[name] for name in (DEFAULT.allocation, *sorted(allocations)) if name in MEASURES}
    if EQUAL_LOSS in allocations:
        for budget in budgets:
            costs = equal_loss("none", at_bits=int(budget))
            found[_key(EQUAL_LOSS, budget)] = Measure(source="BAQ", costs=costs, weighting="none")
    if NOISE in allocations:
        found[NOISE] = Measure(source="HIGGS", costs=lambda e: [relative_error(e.W, q) for q in e.candidates])
    return found


def _key(name: str, budget: float) -> str:
    return f"{EQUAL_LOSS}@{budget:g}" if name == EQUAL_LOSS else name
