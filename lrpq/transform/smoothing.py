"""Channel scales that weights absorb: what a site's layers take into their columns, the layer before them gives up.

For a site's inputs x and a positive factor s a channel, W x = (W diag(s)) (x / s). The division moves into what makes
x: the gain of a norm; the up projection of a gated MLP, whose output the activation of the gate multiplies; the values,
in which attention is linear. Key-value heads that serve several query heads have one factor for all of them, for it
has one place to go to. How factors are chosen is not this file's matter (lrpq.transform.awq,
lrpq.transform.smoothquant).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrpq.checkpoint.plan import MAX_SHARD_BYTES
from lrpq.model.layers import LinearSpec
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.streaming import BlockStream
from lrpq.transform.folds import FoldList, FoldPlan, ScaleColumns, ScaleGain, ScaleLastRows, SkippedPair
from lrpq.transform.graph import smoothable_graph
from lrpq.transform.parts import head_size, num_value_heads, site_layers, stored_biases
from lrpq.transform.writing import TransformReport, write_folded

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A site whose inputs can be scaled, and the module that the inverse goes to."""

    block: int
    site: str
    feed: str
    """Module in the model: a norm, or a linear layer whose last rows make the inputs."""
    is_norm: bool
    layers: tuple[LinearSpec, ...]
    """What reads the site."""
    head_size: int
    """Inputs of one head; where the inputs are not heads', all of them."""
    heads_per_feed: int
    """Heads in a row that are made from one head of the feed; 1 where the feed has all inputs."""

    @property
    def num_factors(self) -> int:
        """Outputs of the feed."""
        return self.layers[0].d_in // self.heads_per_feed

    def by_head(self, inputs: Float[Tensor, "columns=d_in"]) -> Float[Tensor, "feed_heads heads_per_feed head_size"]:
        """Values of the site's inputs; those along the middle dimension share a factor."""
        return inputs.view(-1, self.heads_per_feed, self.head_size)

    def on_inputs(self, factor: Float[Tensor, "channels=factors"]) -> Float[Tensor, "columns=d_in"]:
        """Factors of the feed's outputs, one for every input of the site."""
        heads = factor.view(-1, 1, self.head_size)
        return heads.expand(-1, self.heads_per_feed, -1).reshape(-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairScale:
    """The factors of a pair."""

    pair: Pair
    factor: Float[Tensor, "channels=factors"]
    """Positive, float64, one for every output of the feed; columns are multiplied by it."""
    alpha: float
    """The exponent that it was made with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Smoothing:
    """Factors for a whole model."""

    scales: tuple[PairScale, ...]
    """Pairs that are scaled; the others keep what they have."""
    skipped: tuple[SkippedPair, ...]
    """Pairs that cannot be scaled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerScale:
    """What happens to one linear layer, as the reader of a site and as the feed of another."""

    columns: Float[Tensor, "columns=d_in"] | None = None
    """Multiplied to columns."""
    last_rows: Float[Tensor, "rows=d_out"] | None = None
    """Multiplied to the last rows, as many as there are."""

    def apply(self, W: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
        """The layer's weights in the smoothed model, in new memory."""
        return self._times(W, self.columns, self.last_rows)

    def undo(self, W: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
        """What weights of the smoothed model are in the original, in new memory."""
        inverse = [None if factor is None else 1 / factor for factor in (self.columns, self.last_rows)]
        return self._times(W, *inverse)

    @staticmethod
    def _times(W: Tensor, columns: Tensor | None, last_rows: Tensor | None) -> Tensor:
        made = W.clone() if columns is None else W * columns.to(W)
        if last_rows is not None:
            made[-len(last_rows) :] *= last_rows.to(W).unsqueeze(1)
        return made


def smooth(
    source: ModelSource,
    output: Path,
    smoothing: Smoothing,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> TransformReport:
    """Write the smoothed model to ``output``, a folder that plain transformers loads.

    Args:
        source: the original.
        output: a new or empty folder; it appears whole or not at all.
        smoothing: factors, from ``awq.search_awq`` or ``smoothquant.search_smoothquant``.
        dtype: of the written floating-point tensors; by default each keeps its own.
        max_shard_bytes: bytes of tensors in a file.

    Raises:
        ModelError: the architecture is not supported; it says why.
        ConfigError: the output is taken, or the disk is too small.
        CheckpointError: a value leaves the dtype's range, or writing failed.
    """
    offset = smoothable_graph(source).stored_offset
    plan = smoothing_plan(BlockStream(source, dtype=torch.float32), smoothing, stored_offset=offset)
    return write_folded(source, output, plan, dtype=dtype, max_shard_bytes=max_shard_bytes)


def smoothable_pairs(stream: BlockStream, block: int) -> tuple[list[Pair], list[SkippedPair]]:
    """The pairs of a block, and those whose heads do not group.

    Raises:
        ModelError: the architecture is not supported; it says why.
    """
    graph = smoothable_graph(stream.source)
    prefix = f"{stream.family.blocks}.{block}"
    pairs: list[Pair] = []
    skipped: list[SkippedPair] = []
    for norm in graph.norms:
        layers = site_layers(stream, block, norm.site)
        pairs.append(_pair(block, norm.site, f"{prefix}.{norm.norm}", layers, is_norm=True))
    for linear in graph.linears:
        layers = site_layers(stream, block, linear.site)
        feed = f"{prefix}.{linear.linear}"
        if not linear.per_head:
            pairs.append(_pair(block, linear.site, feed, layers, is_norm=False))
            continue
        size = head_size(stream.source.config)
        num_values = num_value_heads(stream.source.config) * size
        if layers[0].d_in % num_values:
            reason = f"its {layers[0].d_in} inputs are no whole number of groups of {num_values} values"
            skipped.append(SkippedPair(block=block, site=linear.site, reason=reason))
            continue
        heads = layers[0].d_in // num_values
        pairs.append(_pair(block, linear.site, feed, layers, is_norm=False, head_size=size, heads_per_feed=heads))
    return pairs, skipped


def smoothing_plan(stream: BlockStream, smoothing: Smoothing, *, stored_offset: float = 0.0) -> FoldPlan:
    """What every tensor becomes; reads no weights.

    Args:
        stream: the original.
        smoothing: factors.
        stored_offset: the gain of a norm minus what is stored of it.
    """
    folds = FoldList()
    for scale in smoothing.scales:
        pair, inverse = scale.pair, 1 / scale.factor
        weight = stream.stored(f"{pair.feed}.weight")
        if pair.is_norm:
            folds.add(weight, ScaleGain(factor=inverse, offset=stored_offset))
        else:
            folds.add([*weight, *stored_biases(stream, pair.feed)], ScaleLastRows(factor=inverse))
        for layer in pair.layers:
            folds.add(layer.stored, ScaleColumns(factor=pair.on_inputs(scale.factor)))
    return FoldPlan(tensors=folds.tensors(), skipped=smoothing.skipped)


def layer_scales(scales: Sequence[PairScale]) -> Mapping[str, LayerScale]:
    """What happens to each linear layer, by module name."""
    columns = {layer.name: s.pair.on_inputs(s.factor) for s in scales for layer in s.pair.layers}
    rows = {s.pair.feed: 1 / s.factor for s in scales if not s.pair.is_norm}
    names = [*columns, *(name for name in rows if name not in columns)]
    return {name: LayerScale(columns=columns.get(name), last_rows=rows.get(name)) for name in names}


def _pair(
    block: int,
    site: str,
    feed: str,
    layers: tuple[LinearSpec, ...],
    *,
    is_norm: bool,
    head_size: int | None = None,
    heads_per_feed: int = 1,
) -> Pair:
    return Pair(
        block=block,
        site=site,
        feed=feed,
        is_norm=is_norm,
        layers=layers,
        head_size=head_size or layers[0].d_in,
        heads_per_feed=heads_per_feed,
    )
