"""A comparison: every method at every budget, scored on the same windows."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lrpq.allocate.trellis import check_streams, takes_trellis, without_streams
from lrpq.compare.allocation import levels
from lrpq.compare.memory import peak_memory
from lrpq.compare.methods import Method
from lrpq.compare.planned import COOPQ, REESTIMATED, SWAPS, level_pairs
from lrpq.compare.prepared import Prepared
from lrpq.compare.recipes import Recipe
from lrpq.compare.transforms import DEPENDS_ON_BITS, NONE, TRANSFORMS, TransformInputs
from lrpq.compare.workbench import Quantized, Workbench
from lrpq.errors import CalibrationError, LrpqError, QuantizationError
from lrpq.evaluate.divergence import ORIGINAL, VARIANT, WindowScore
from lrpq.importance.registry import MEASURES
from lrpq.model.layers import Choice, LinearSpec
from lrpq.model.source import open_source

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

Key = tuple[str, Choice | None]
"""A transform, and the choice its search was made for."""


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
    """For its plan and its codes."""
    evidence_seconds: float
    """For its transform and for the evidence of all methods that share it."""
    peak_bytes: int
    checkpoint_bytes: int
    """Of the packed checkpoint, embeddings and head included: a rotated model's head is untied."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """What its allocation has to say of itself."""


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
        self.original: Sequence[WindowScore] = ()
        """The original's own scores, once a row has been yielded."""

    def check(self) -> None:
        """Refuse what cannot be done before any work is done.

        Raises:
            LrpqError: a method needs held-out windows, other widths, or a model of another kind; it is named.
        """
        specs = self.bench.stream().specs if self.bench.terms.trellis else ()
        for name, budget in self.wanted:
            recipe = self.methods[name].recipe
            try:
                self.bench.check(recipe)
                measure = MEASURES.get(recipe.allocation)
                if measure is not None and measure.score is not None:
                    levels(self.bench.terms.choices, budget_bits=budget)
                if recipe.allocation == SWAPS and (self.bench.held_out is None or not len(self.bench.held_out)):
                    raise CalibrationError("swaps are accepted on held-out windows, and there are none")
                if recipe.allocation == COOPQ:
                    level_pairs(self.bench.terms.bits)
                if self.bench.terms.trellis and not recipe.uniform_codes:
                    _check_streams(recipe, specs)
            except LrpqError as error:
                raise type(error)(f"method {name}: {error}") from error

    def rows(self) -> Iterator[Row]:
        """Yield a row as soon as it is measured; methods on one transformed model follow each other."""
        groups: dict[Key, list[tuple[str, float]]] = {}
        for name, budget in self.wanted:
            groups.setdefault(self._key(self.methods[name].recipe, budget), []).append((name, budget))
        for key, members in groups.items():
            with tempfile.TemporaryDirectory(prefix="lrpq-transformed-") as scratch:
                started = time.monotonic()
                bench = self._bench(key, Path(scratch) / "model")
                recipes = [self.methods[name].recipe for name, _ in members]
                prepared = Prepared(bench, recipes, sorted({budget for _, budget in members}))
                evidence_seconds = time.monotonic() - started
                for name, budget in members:
                    yield self._row(prepared, name, budget, evidence_seconds)

    def _key(self, recipe: Recipe, budget: float) -> Key:
        if recipe.transform not in DEPENDS_ON_BITS:
            return recipe.transform, None
        terms = self.bench.terms
        return recipe.transform, Choice(bits=max(min(terms.bits), int(budget)), group_size=max(terms.group_sizes))

    def _bench(self, key: Key, folder: Path) -> Workbench:
        transform, choice = key
        if transform == NONE:
            return self.bench.scaled()
        source, tokens, terms = self.bench.source, self.bench.tokens, self.bench.terms
        inputs = TransformInputs(source=source, tokens=tokens, terms=terms, choice=choice or terms.choices[0])
        TRANSFORMS[transform](inputs, folder)
        return Workbench(open_source(folder), tokens, terms, held_out=self.bench.held_out).scaled()

    def _row(self, prepared: Prepared, name: str, budget: float, evidence_seconds: float) -> Row:
        recipe = self.methods[name].recipe
        started = time.monotonic()
        with peak_memory(self.bench.terms.device) as peak:
            planned = prepared.planned(recipe, budget)
            plan, codes = planned.plan, planned.codes
            quantized = (
                prepared.bench.quantized(plan.choices, recipe, prepared.gathered)
                if codes is None
                else Quantized(codes=codes, vectors={})
            )
        seconds = time.monotonic() - started
        scores = prepared.bench.scores(self.windows, quantized, original=self.bench)
        self.original = scores[ORIGINAL]
        counts = dict(planned.counts)
        if self.bench.terms.trellis and not recipe.uniform_codes:
            counts["modules_without_streams"] = without_streams(plan.choices, prepared.specs)
        return Row(
            method=name,
            budget_bits=budget,
            all_in_bits=plan.average_bits,
            predicted_nats=prepared.predicted_nats(plan),
            scores=scores[VARIANT],
            seconds=seconds,
            evidence_seconds=evidence_seconds,
            peak_bytes=peak.bytes,
            checkpoint_bytes=prepared.checkpoint_bytes(plan),
            counts=counts,
        )


def _check_streams(recipe: Recipe, specs: Sequence[LinearSpec]) -> None:
    """Refuse trellis codes that would not be those of the recipe's plan."""
    check_streams(specs)
    if recipe.allocation in (COOPQ, REESTIMATED, SWAPS):
        raise QuantizationError("its plan is found with uniform codes; compare it with those")
    short = next((spec.name for spec in specs if not takes_trellis(spec)), None)
    measure = MEASURES.get(recipe.allocation)
    one_width = recipe.allocation == "uniform" or (measure is not None and measure.score is not None)
    if one_width and short is not None:
        raise QuantizationError(
            f"{short} has no rows for streams, so that no trellis choice is everybody's; compare it with uniform codes"
        )
