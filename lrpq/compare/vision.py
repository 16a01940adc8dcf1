"""An image classifier with quantized weights and activations, made by the same evidence, allocation and rounding.

    calibrate activation grids -> fold those of LayerNorm's channels into the model -> costs, plan and codes of the
    folded model's weights (compare/workbench.py) -> a variant that computes on grids and codes

Weights have one scale a row, so that linear layers run in integer arithmetic. Patch embedding, position embeddings,
norms and the classifier stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from enum import Enum
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lrpq.activations.allocate import allocate_widths
from lrpq.activations.apply import GridActivations, quantized_block
from lrpq.activations.calibrate import BlockGrids, Means, calibrate
from lrpq.activations.folding import fold_plan
from lrpq.allocate.plan import Plan
from lrpq.compare.prepared import Prepared
from lrpq.compare.recipes import Recipe
from lrpq.compare.terms import Terms
from lrpq.compare.workbench import Workbench
from lrpq.errors import ConfigError
from lrpq.model.layers import Choice, LinearSpec
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.source import open_source
from lrpq.model.streaming import BlockStream
from lrpq.quant.grid import QuantizedWeight
from lrpq.quant.packing import storage_bits
from lrpq.transform.writing import write_folded

if TYPE_CHECKING:
    from jaxtyping import Float

PER_ROW = -1


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
    terms: Terms | None = None,
) -> QuantizedClassifier:
    """Quantize a classifier.

    Args:
        source: the model.
        images: to calibrate on, preprocessed.
        weight_bits: widths that a layer may have.
        average_bits: the weights take no more than with this width everywhere.
        activation_bits: widths that activations may have; with none they stay as they are. Of several, the middle one
            is their average.
        recipe: how weights are allocated and rounded.
        folded: new folder for the folded model; not written where nothing is folded.
        means: of the activation grids.
        behind: what weights are rounded behind.
        terms: seed, damping, shards and device; widths and group sizes are set here. Float32 by default.

    Raises:
        ConfigError: an even number of widths for activations, which has no middle, or several whose errors are not
            judged by outputs: those of different places have different units.
        LrpqError: see `calibrate`, `fold_plan` and `Prepared`.
    """
    if activation_bits and len(activation_bits) % 2 == 0:
        shown = ", ".join(map(str, sorted(activation_bits)))
        raise ConfigError(f"activations of {shown} bits have no middle width to average to: give an odd number")
    if len(activation_bits) > 1 and Means.JUDGED_BY_OUTPUT not in means:
        raise ConfigError("widths of activations are mixed by the errors of outputs; give one width, or judge by them")
    shared = terms or Terms(dtype=torch.float32, micro_batch=32)
    shared = replace(shared, bits=tuple(weight_bits), group_sizes=(PER_ROW,))
    stream = BlockStream(source, dtype=shared.dtype, device=shared.device)
    grids: Sequence[BlockGrids] = ({},) * stream.num_blocks
    widths: dict[tuple[int, str], int] = {}
    if activation_bits:
        found = calibrate(
            stream,
            images,
            widths=activation_bits,
            means=means,
            token_weights=token_weights(source, images, shared) if Means.JUDGED_BY_OUTPUT in means else None,
            micro_batch=shared.micro_batch,
        )
        average = sorted(activation_bits)[len(activation_bits) // 2]
        mixed = len(activation_bits) > 1
        widths = allocate_widths(found, average_bits=average) if mixed else found.uniform(average)
        grids, foldings = found.grids(widths), found.foldings(widths)
        if foldings:
            write_folded(source, folded, fold_plan(stream, foldings), dtype=torch.float32)
            source = open_source(folded)
            stream = BlockStream(source, dtype=shared.dtype, device=shared.device)
    budget = uniform_bits(stream.specs, average_bits)
    prepared = Prepared(Workbench(source, images, shared), [recipe], [budget])
    plan = prepared.plan(recipe.allocation, budget)
    activations = GridActivations(stream=stream, grids=grids) if behind is Behind.ACTIVATIONS else None
    codes = prepared.bench.codes(plan.choices, recipe, prepared.gathered, activations)
    return QuantizedClassifier(stream=stream, grids=grids, codes=codes, plan=plan, widths=widths)


def token_weights(source: ModelSource, images: Tensor, terms: Terms) -> dict[int, Mapping[str, Tensor]]:
    """Block -> site -> squared gradients at the outputs of its layers: the weight of a squared output error in nats."""
    walk = Workbench(source, images, replace(terms, power=1.0, floor=0.0)).walk_back(weightings=("fisher",))
    found = [evidence.weights["fisher"] for evidence in walk]
    return dict(zip(range(len(found) - 1, -1, -1), found, strict=True))


def uniform_bits(specs: Sequence[LinearSpec], bits: int) -> float:
    """All-in bits a weight with one width everywhere and a scale a row, rounded up: a budget that this width meets."""
    choice = Choice(bits=bits, group_size=PER_ROW)
    total = sum(storage_bits(spec.d_out, spec.d_in, choice) for spec in specs)
    num_weights = sum(spec.num_weights for spec in specs)
    found = total / num_weights
    return found if Fraction(repr(found)) * num_weights >= total else math.nextafter(found, math.inf)
