"""Weights scaled by powers of two: the same function, bit for bit, with weights of another magnitude.

For a site's inputs x and an integer k, W x = (2^k W) (2^-k x). Behind a norm the division moves into its gain. What is
added to the residual stream has one exponent r for the whole model: embeddings, o and down projections are multiplied
by 2^r, and with 4^r times their epsilon the norms behind make the same of it. (Where norms inside attention have the
same epsilon, the rows of q and k take 2^r too.) The last norm divides for the head; a tied one has the embedding's r.

A power of two changes no digit of a floating-point number, so all sums and products keep theirs, in whatever order they
are made. Gradients at a site's outputs change by one factor for all of its layers, so token weights and costs change by
factors alone. That is why the values give up nothing for o, nor up for down: they share their sites with layers that
have nothing to give up. (Where rows of q and k take 2^r, v counts for more beside them in the weights of tokens.) What
does change is the range: scales that are stored in few bits of exponent fit (`magnitudes` chooses).

Exact as long as nothing leaves the normal numbers of its type: bfloat16 and float32 are far from that, float16 is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lrpq.errors import ModelError
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.streaming import BlockStream
from lrpq.transform.folded import FoldedSource
from lrpq.transform.folds import FoldList, FoldPlan, PowerOfTwo
from lrpq.transform.graph import Graph, exactly_scalable_graph
from lrpq.transform.parts import routers_of, site_layers, stored_biases

EPSILON = "rms_norm_eps"
"""Field of the configuration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exponents:
    """Powers of two of a model."""

    blocks: tuple[Mapping[str, int], ...]
    """Of every block: input site behind a norm -> k; the columns of what reads it are multiplied by 2^k."""
    residual: int
    """r; what is added to the residual stream is multiplied by 2^r."""
    head: int
    """k of the head; 0 where it is tied to the embedding."""


class ScaledSource(FoldedSource):
    """A scaled model without a copy of it (`folded`).

    Args:
        source: the original, or a rotated one.
        exponents: of its sites.

    Raises:
        ModelError: the exponents are of another model, or the scaling would round.
    """

    changed_by: ClassVar[str] = "scaled by powers of two"
    instead: ClassVar[str] = "compress the model with scales of 16 bits"

    def __init__(self, source: ModelSource, exponents: Exponents) -> None:
        super().__init__(source, exponents_plan(source, exponents))


class StoredScaledSource(ScaledSource):
    """The same as it is when it is loaded from a checkpoint: what computes has the stored dtype's values."""

    def read_rows(self, names: Sequence[str]) -> Tensor:
        """Read tensors whose rows make one, each rounded once to its stored dtype."""
        return ModelSource.read_rows(self, names)


def check_exact(source: ModelSource) -> Graph:
    """The table's entry of a model in which a power of two changes no digit.

    Raises:
        ModelError: there is none; it says why.
    """
    graph = exactly_scalable_graph(source)
    for name in source.names():
        if source.dtype(name) is torch.float16:
            raise ModelError(
                f"tensor {name} of {source.folder}: is stored in float16, whose range is too small for gains and "
                "weights scaled by powers of two; give the model in bfloat16, or compress it with scales of 16 bits"
            )
    return graph


def exponents_plan(source: ModelSource, exponents: Exponents) -> FoldPlan:
    """What every tensor becomes; reads no weights.

    Raises:
        ModelError: the exponents are of another model, or the scaling would round.
    """
    graph = check_exact(source)
    stream = BlockStream(source, dtype=torch.float32)
    _check_belong(stream, graph, exponents)
    folds, r = FoldList(), exponents.residual
    embedding, head = (f"{path}.weight" for path in (stream.family.outside[0], stream.family.head))
    tied_names = {*stream.stored(embedding), *(stream.stored(head) if stream.tied_head else ())}
    folds.add(sorted(tied_names), PowerOfTwo(exponent=r))
    for block, of_block in enumerate(exponents.blocks):
        _scale_block(stream, graph, block, of_block, r, folds)
    if not stream.tied_head:
        folds.add(stream.stored(head), PowerOfTwo(exponent=exponents.head))
    k = r if stream.tied_head else exponents.head
    folds.add(stream.stored(f"{stream.family.tail[0]}.weight"), PowerOfTwo(exponent=-k))
    return FoldPlan(tensors=folds.tensors(), config_changes={EPSILON: getattr(source.config, EPSILON) * 4.0**r})


def _scale_block(
    stream: BlockStream, graph: Graph, block: int, of_block: Mapping[str, int], r: int, folds: FoldList
) -> None:
    prefix = f"{stream.family.blocks}.{block}"
    for feed in graph.norms:
        k = of_block[feed.site]
        folds.add(stream.stored(f"{prefix}.{feed.norm}.weight"), PowerOfTwo(exponent=-k))
        for spec in site_layers(stream, block, feed.site):
            folds.add(spec.stored, PowerOfTwo(exponent=k))
        for router in routers_of(stream, block, feed.routers):
            folds.add(stream.stored(f"{router}.weight"), PowerOfTwo(exponent=k))
    written = [spec.name for site in graph.writes for spec in site_layers(stream, block, site)]
    for spec in (
        s for s in stream.block_specs(block) if s.name in {*written, *(f"{prefix}.{n}" for n in graph.normed)}
    ):
        folds.add([*spec.stored, *stored_biases(stream, spec.name)], PowerOfTwo(exponent=r))


def _check_belong(stream: BlockStream, graph: Graph, exponents: Exponents) -> None:
    sites = {feed.site for feed in graph.norms}
    if (
        len(exponents.blocks) != stream.num_blocks
        or any(set(of_block) != sites for of_block in exponents.blocks)
        or (exponents.head and stream.tied_head)
    ):
        raise ModelError(
            f"model {stream.source.folder}: has {stream.num_blocks} blocks with norms before {', '.join(sorted(sites))}"
            f" and a {'tied' if stream.tied_head else 'separate'} head; the powers of two are another model's; give "
            "the model that the checkpoint was made from"
        )
