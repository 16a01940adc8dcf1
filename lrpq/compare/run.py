"""A comparison: every method at every budget, scored on the same windows."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lrpq.allocate.plan import Plan
from lrpq.allocate.problem import CostRow
from lrpq.compare import allocation
from lrpq.compare.memory import peak_memory
from lrpq.compare.methods import EQUAL_LOSS, NOISE, ONE_AT_A_TIME, Method
from lrpq.compare.workbench import Gathered, Workbench
from lrpq.errors import ConfigError
from lrpq.evaluate.divergence import ORIGINAL, WindowScore
from lrpq.importance.equal_loss import equal_loss
from lrpq.importance.measured import filled, noise_factors, one_at_a_time, relative_error
from lrpq.importance.registry import MEASURES, Measure
from lrpq.model.layers import Choice

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

PROBE_WINDOWS = 4
"""Calibration windows on which single modules are measured."""
MEASURED_BITS = (2, 3, 4)
"""Widths that are measured; wider ones follow the estimate, scaled to meet the widest measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One method at one budget."""

    method: str
    budget_bits: float
    all_in_bits: float
    """Reached."""
    predicted_nats: float
    """Of the plan under lrpq's costs."""
    scores: Sequence[WindowScore]
    seconds: float
    """For its codes; evidence, which methods share, is apart."""
    peak_bytes: int


class Comparison:
    """Args:
    bench: model, tokens and terms.
    methods: by name.
    wanted: (name of a method, all-in bits per weight), in the order in which rows are yielded.
    windows: what the methods are scored on.
    """

    def __init__(
        self,
        bench: Workbench,
        methods: Mapping[str, Method],
        wanted: Sequence[tuple[str, float]],
        windows: Int[Tensor, "windows length"],
    ) -> None:
        self.bench, self.windows = bench, windows
        self.wanted = tuple(wanted)
        self.methods = {name: methods[name] for name, _ in wanted}
        self.budgets = sorted({budget for _, budget in wanted})
        self.gathered = Gathered()
        self.evidence_seconds = 0.0
        self.original: Sequence[WindowScore] = ()
        self._costs: dict[str, list[CostRow]] = {}

    def rows(self) -> Iterator[Row]:
        """Yield a row as soon as it is measured; after ``gather``."""
        for name, budget in self.wanted:
            yield self._row(name, self.methods[name], budget)

    def gather(self) -> None:
        """Find what the methods need to know: costs, scores, token weights."""
        recipes = [method.recipe for method in self.methods.values()]
        allocations = {recipe.allocation for recipe in recipes}
        measures: dict[str, Measure] = {"lrpq": MEASURES["lrpq"]}
        measures |= {name: MEASURES[name] for name in allocations if name in MEASURES}
        if EQUAL_LOSS in allocations:
            measures |= {
                f"{EQUAL_LOSS}@{budget:g}": Measure(
                    source="BAQ", costs=equal_loss("none", at_bits=int(budget)), weighting="none"
                )
                for budget in self.budgets
            }
        if NOISE in allocations:
            measures[NOISE] = Measure(source="HIGGS", costs=lambda e: [relative_error(e.W, q) for q in e.candidates])
        weightings = {recipe.weighting for recipe in recipes}
        started = time.monotonic()
        self.gathered = self.bench.gather(
            measures,
            weightings=sorted(weightings),
            candidates_by=str(MEASURES["lrpq"].weighting),
            keep_candidates=ONE_AT_A_TIME in allocations,
        )
        self._costs = dict(self.gathered.costs)
        if NOISE in allocations:
            self._costs[NOISE] = self._noise_costs()
        if ONE_AT_A_TIME in allocations:
            self._costs[ONE_AT_A_TIME] = self._measured_costs()
        self.evidence_seconds = time.monotonic() - started

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
        rows = self.gathered.costs["lrpq"]
        estimated: dict[str, dict[Choice, float]] = {}
        for row in rows:
            if row.choice is not None:
                estimated.setdefault(row.module.name, {})[row.choice] = row.cost_nats
        return allocation.with_costs(rows, filled(measured, estimated))

    def plan(self, name: str, budget: float) -> Plan:
        """The plan of an allocation, by its name."""
        ours = self.gathered.costs["lrpq"]
        if name == "uniform":
            return allocation.uniform(ours, budget_bits=budget)
        if name in self.gathered.scores:
            return allocation.by_ranking(ours, self.gathered.scores[name], budget_bits=budget)
        key = f"{EQUAL_LOSS}@{budget:g}" if name == EQUAL_LOSS else name
        return allocation.by_costs(self._costs[key], budget_bits=budget)

    def _row(self, name: str, method: Method, budget: float) -> Row:
        plan = self.plan(method.recipe.allocation, budget)
        ours = {(row.module.name, row.choice): row.cost_nats for row in self.gathered.costs["lrpq"]}
        started = time.monotonic()
        with peak_memory(self.bench.terms.device) as peak:
            codes = self.bench.codes(plan.choices, method.recipe, self.gathered)
        seconds = time.monotonic() - started
        scores = self.bench.scores(self.windows, {name: codes})
        self.original = scores[ORIGINAL]
        return Row(
            method=name,
            budget_bits=budget,
            all_in_bits=plan.average_bits,
            predicted_nats=sum(ours[module, choice] for module, choice in plan.choices.items()),
            scores=scores[name],
            seconds=seconds,
            peak_bytes=peak.bytes,
        )
