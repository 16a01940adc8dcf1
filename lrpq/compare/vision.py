"""An image classifier with quantized weights and activations, made by the same evidence, allocation and rounding.

    walk the gradients back once (compare/shared_walk.py) -> calibrate activation grids -> fold those of LayerNorm's
    channels into the model -> costs, plan and codes of the folded model's weights (compare/workbench.py) -> a variant
    that computes on grids and codes

Weights have one scale a row, so that linear layers run in integer arithmetic. Patch embedding, position embeddings,
norms and the classifier stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lrpq.activations.allocate import allocate_widths
from lrpq.activations.apply import GridActivations, quantized_block
from lrpq.activations.calibrate import BlockGrids, Calibration, Means, calibrate
from lrpq.activations.folding import fold_plan
from lrpq.allocate.budget import bits_for
from lrpq.allocate.plan import Plan
from lrpq.compare import contribution
from lrpq.compare.prepared import Prepared, asked_of
from lrpq.compare.recipes import DEFAULT, Recipe
from lrpq.compare.shared_walk import FoldedBench, SharedWalk
from lrpq.compare.terms import Terms
from lrpq.compare.vision_widths import WidthBudget, allocate_directional, middle_width
from lrpq.compare.workbench import KEPT_BYTES, Workbench
from lrpq.errors import ConfigError
from lrpq.model.kept import KeptInputs
from lrpq.model.layers import Choice, LinearSpec
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.source import open_source
from lrpq.model.streaming import BlockStream
from lrpq.quant.grid import QuantizedWeight
from lrpq.quant.packing import storage_bits
from lrpq.transform.writing import write_folded
from lrpq.tune.options import Reconstruction
from lrpq.tune.reconstruct import BlockOutcome, Rebuilder

if TYPE_CHECKING:
    from jaxtyping import Float

PER_ROW = -1
COSTED_TOGETHER = (WidthBudget.AVERAGES, WidthBudget.BITS, WidthBudget.OPERATIONS)
"""Budgets whose costs are taken of weights and activations at once, in a model folded for the middle width."""


class Behind(Enum):
    """What the inputs of a layer are when its weights are rounded; its prefix has quantized weights in any case."""

    WEIGHTS = "weights"
    """Activations in full precision."""
    ACTIVATIONS = "activations"
    """Quantized activations, the layer's own inputs among them: the correction makes up for their errors too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedClassifier:
    """What evaluation needs."""

    stream: BlockStream
    """The model, folded."""
    grids: Sequence[BlockGrids]
    """By block."""
    codes: Mapping[str, QuantizedWeight]
    plan: Plan | None
    """Of the weights; None where they are not quantized."""
    widths: Mapping[tuple[int, str], int]
    """(block, site or point) -> width of its activations."""
    rebuilt: Sequence[BlockOutcome] = ()
    """What reconstruction did, by block; empty where none was asked for."""

    def variant(self, index: int, block: nn.Module) -> AbstractContextManager[None]:
        """Scope in which a block of ``stream`` computes as quantized (lrpq.evaluate.classification.Variant)."""
        return quantized_block(self.stream, index, block, self.grids[index], self.codes)


def quantize_classifier(
    source: ModelSource,
    images: Float[Tensor, "n channels height width"],
    *,
    weight_bits: Sequence[int],
    average_bits: int,
    activation_bits: Sequence[int],
    recipe: Recipe,
    folded: Path,
    means: Means = Means.ALL,
    behind: Behind = Behind.ACTIVATIONS,
    budget: WidthBudget = WidthBudget.BITS,
    reconstruct: Reconstruction | None = None,
    terms: Terms | None = None,
) -> QuantizedClassifier:
    """Quantize a classifier.

    Args:
        source: the model.
        images: to calibrate on, preprocessed.
        weight_bits: widths that a layer may have.
        average_bits: what the budget has for every weight.
        activation_bits: widths that activations may have; with none they stay as they are. Of several, the budget has
            the middle one for every activation.
        recipe: how weights are allocated and rounded.
        folded: new folder for the folded model; not written where nothing is folded.
        means: of the activation grids.
        behind: what weights are rounded behind.
        budget: what mixed widths may take.
        reconstruct: how each block is rebuilt when its codes are found; by default it is not.
        terms: seed, damping, shards and device; widths and group sizes are set here. Float32 by default.

    Raises:
        ConfigError: an even number of widths for activations, which has no middle; several whose errors are not
            judged by outputs where costs are taken apart: those of different places have different units; or a budget
            that the recipe cannot be given (`allocate_directional`).
        LrpqError: see `calibrate`, `fold_plan` and `Prepared`.
    """
    middle = middle_width(activation_bits) if activation_bits else 0
    if budget is WidthBudget.BITS and len(activation_bits) < 2:
        budget = WidthBudget.APART
    if budget is WidthBudget.APART and len(activation_bits) > 1 and Means.JUDGED_BY_OUTPUT not in means:
        raise ConfigError("widths of activations are mixed by the errors of outputs; give one width, or judge by them")
    shared = terms or Terms(dtype=torch.float32, micro_batch=32)
    shared = replace(shared, bits=tuple(weight_bits), group_sizes=(PER_ROW,))
    stream = BlockStream(source, dtype=shared.dtype, device=shared.device)
    budget_bits = uniform_bits(stream.specs, average_bits)
    by_contribution = budget is WidthBudget.CONTRIBUTION
    if by_contribution and not activation_bits:
        raise ConfigError("contribution scores choose the widths of activations too; give widths for them")
    scores: contribution.Scores = {}
    found: Calibration | None = None
    walk: SharedWalk | None = None
    widths: Mapping[tuple[int, str], int] = {}
    if activation_bits:
        judged = Means.JUDGED_BY_OUTPUT in means
        if judged or by_contribution:
            recipes = [recipe, replace(recipe, allocation=contribution.MEASURE)] if by_contribution else [recipe]
            walk = SharedWalk(Workbench(source, images, shared), asked_of(recipes, [budget_bits]))
        found = calibrate(
            stream,
            images,
            widths=activation_bits,
            means=means,
            token_weights=walk.squares if walk is not None and judged else None,
            micro_batch=shared.micro_batch,
        )
        widths = found.uniform(middle)
        if len(activation_bits) > 1 and budget is WidthBudget.APART:
            widths = allocate_widths(found, average_bits=middle)
        elif by_contribution and walk is not None:
            scores = contribution.contributions(walk.evidence)
            widths = contribution.activation_widths(found, stream, scores, average_bits=middle)

    def folded_bench(folder: Path) -> Workbench:
        """Of the model folded for the widths that are chosen by now; itself where nothing is folded."""
        foldings = {} if found is None else found.foldings(widths)
        if not foldings:
            model = source
        else:
            write_folded(source, folder, fold_plan(stream, foldings), dtype=torch.float32)
            model = open_source(folder)
        if walk is None:
            return Workbench(model, images, shared)
        return FoldedBench(model, images, shared, walk=walk, foldings=foldings)

    if budget not in COSTED_TOGETHER:
        bench = folded_bench(folded)
        prepared = Prepared(bench, [recipe], [budget_bits])
        gathered = prepared.gathered
        if by_contribution:
            rows = gathered.costs[DEFAULT.allocation]
            plan = contribution.weight_widths(rows, scores, budget_bits=budget_bits)
        else:
            plan = prepared.plan(recipe.allocation, budget_bits)
    else:
        with TemporaryDirectory(prefix="lrpq-folded-") as scratch:
            allocated = allocate_directional(
                folded_bench(Path(scratch) / "model"),
                found,
                recipe,
                budget=budget,
                average_bits=average_bits,
                budget_bits=budget_bits,
                middle=middle,
            )
        widths, plan, gathered = allocated.widths, allocated.plan, allocated.gathered
        bench = folded_bench(folded)
    grids: Sequence[BlockGrids] = ({},) * stream.num_blocks if found is None else found.grids(widths)
    quantized = bench.stream()
    rebuilder = None
    with KeptInputs(memory_bytes=KEPT_BYTES) as kept:
        if reconstruct is not None:
            rebuilder = Rebuilder(
                quantized, images, grids, reconstruct, seed=shared.seed, micro_batch=shared.micro_batch, kept=kept
            )
            grids = rebuilder.grids  # those of a block change when it is rebuilt
        activations = GridActivations(stream=quantized, grids=grids) if behind is Behind.ACTIVATIONS else None
        codes = bench.codes(plan.choices, recipe, gathered, activations, rebuilder)
    return QuantizedClassifier(
        stream=quantized,
        grids=tuple(grids),
        codes=codes,
        plan=plan,
        widths=widths,
        rebuilt=() if rebuilder is None else tuple(rebuilder.outcomes),
    )


def uniform_bits(specs: Sequence[LinearSpec], bits: int) -> float:
    """All-in bits a weight with one width everywhere and a scale a row, rounded up: a budget that this width meets."""
    choice = Choice(bits=bits, group_size=PER_ROW)
    total = sum(storage_bits(spec.d_out, spec.d_in, choice) for spec in specs)
    return bits_for(total, num_weights=sum(spec.num_weights for spec in specs))
