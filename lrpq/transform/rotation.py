"""Rotation of the residual stream, folded into the weights (QuaRot, SpinQuant's R1; RSQ before it quantizes).

With an orthogonal Q every hidden state x becomes x Q. RMSNorm without a gain commutes with that, for it divides by the
length alone. So the gains g move into the layers behind the norms, W diag(g) Q; what is added to the stream is rotated,
Q^T W and Q^T b; embeddings become E Q, and the head reads the final norm like any layer. A tied head holds another
norm's gain than the embedding and is untied: its bytes are then in the checkpoint.

Norms inside attention (Qwen3's q and k norms) act on heads, not on the stream, and stay.

Optionally each block's values are rotated as well (SpinQuant's R2): attention is linear in them, so that a rotation of
a head's value channels is undone in the output projection. One rotation serves all heads of a block.

Sources: Ashkboos et al. 2024 (QuaRot, arXiv:2404.00456), Liu et al. 2024 (SpinQuant, arXiv:2405.16406), Sung et al.
2025 (RSQ, arXiv:2503.01820). Only what is folded offline is done: no rotations in the forward, no learned ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrpq.checkpoint.plan import MAX_SHARD_BYTES
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.streaming import BlockStream
from lrpq.transform.folds import (
    FoldedTensor,
    FoldList,
    FoldPlan,
    RotateColumns,
    RotateLastRows,
    ScaleColumns,
    UnitGain,
)
from lrpq.transform.graph import Graph, rotatable_graph
from lrpq.transform.orthogonal import Orthogonal, RotationKind, draw_rotation
from lrpq.transform.parts import head_size, num_value_heads, routers_of, site_layers, stored_biases
from lrpq.transform.writing import TransformReport, write_folded

if TYPE_CHECKING:
    from jaxtyping import Float


class RotationScope(Enum):
    """What is rotated."""

    RESIDUAL = "residual"
    """The residual stream (R1)."""
    RESIDUAL_AND_VALUES = "residual_and_values"
    """And each block's values (R2)."""


def rotate(
    source: ModelSource,
    output: Path,
    *,
    generator: torch.Generator,
    kind: RotationKind = RotationKind.HADAMARD,
    scope: RotationScope = RotationScope.RESIDUAL,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> TransformReport:
    """Write the rotated model to ``output``, a folder that plain transformers loads.

    Args:
        source: the original.
        output: a new or empty folder; it appears whole or not at all.
        generator: of the CPU; the residual rotation is drawn first, then one a block for the values.
        kind: how rotations are drawn.
        scope: what is rotated.
        dtype: of the written floating-point tensors; by default each keeps its own.
        max_shard_bytes: bytes of tensors in a file.

    Raises:
        ModelError: the architecture computes another function when rotated.
        ConfigError: the output is taken, or the disk is too small.
        CheckpointError: a value leaves the dtype's range, or writing failed.
    """
    plan = drawn_plan(source, generator=generator, kind=kind, scope=scope)
    return write_folded(source, output, plan, dtype=dtype, max_shard_bytes=max_shard_bytes)


def drawn_plan(
    source: ModelSource, *, generator: torch.Generator, kind: RotationKind, scope: RotationScope
) -> FoldPlan:
    """What every tensor becomes under rotations drawn from ``generator``; arguments and errors as of `rotate`."""
    graph = rotatable_graph(source)
    stream = BlockStream(source, dtype=torch.float32)
    Q = draw_rotation(kind, source.config.get_text_config().hidden_size, generator=generator)
    values: dict[int, Orthogonal] = {}
    if scope is RotationScope.RESIDUAL_AND_VALUES:
        size = head_size(source.config)
        values = {b: draw_rotation(kind, size, generator=generator) for b in range(stream.num_blocks)}
    return rotation_plan(stream, graph, Q, values=values)


def rotation_plan(
    stream: BlockStream,
    graph: Graph,
    Q: Orthogonal,
    *,
    values: Mapping[int, Orthogonal] | None = None,
) -> FoldPlan:
    """What every tensor becomes; reads the gains of the norms and no other weights.

    Args:
        stream: the original.
        graph: its table entry.
        Q: float64; hidden states x become x Q.
        values: block -> rotation of the values of its heads.
    """
    folds = FoldList()
    family, offset = stream.family, graph.stored_offset
    embedding, head = _embedding_and_head(stream)
    folds.add([embedding.name], RotateColumns(Q=Q), origin=embedding.origin)
    gain = _gain(stream, f"{family.tail[0]}.weight", offset)
    folds.add([head.name], ScaleColumns(factor=gain), RotateColumns(Q=Q), origin=head.origin)
    folds.add(stream.stored(f"{family.tail[0]}.weight"), UnitGain(offset=offset))
    for block in range(stream.num_blocks):
        _rotate_residual(stream, graph, block, Q, folds)
        if values:
            _rotate_values(stream, graph, block, values[block], folds)
    return FoldPlan(tensors=folds.tensors(), config_changes={"tie_word_embeddings": False} if stream.tied_head else {})


def _rotate_residual(stream: BlockStream, graph: Graph, block: int, Q: Orthogonal, folds: FoldList) -> None:
    prefix = f"{stream.family.blocks}.{block}"
    for feed in graph.norms:
        name = f"{prefix}.{feed.norm}.weight"
        absorbed = ScaleColumns(factor=_gain(stream, name, graph.stored_offset))
        for spec in site_layers(stream, block, feed.site):
            folds.add(spec.stored, absorbed, RotateColumns(Q=Q))
        for router in routers_of(stream, block, feed.routers):
            folds.add(stream.stored(f"{router}.weight"), absorbed, RotateColumns(Q=Q))
        folds.add(stream.stored(name), UnitGain(offset=graph.stored_offset))
    for site in graph.writes:
        for spec in site_layers(stream, block, site):
            folds.add([*spec.stored, *stored_biases(stream, spec.name)], RotateLastRows(Q=Q, num_rows=len(Q)))


def _rotate_values(stream: BlockStream, graph: Graph, block: int, R: Orthogonal, folds: FoldList) -> None:
    for feed in (feed for feed in graph.linears if feed.per_head):
        name = f"{stream.family.blocks}.{block}.{feed.linear}"
        num_rows = len(R) * num_value_heads(stream.source.config)
        folds.add(
            [*stream.stored(f"{name}.weight"), *stored_biases(stream, name)], RotateLastRows(Q=R, num_rows=num_rows)
        )
        for spec in site_layers(stream, block, feed.site):
            folds.add(spec.stored, RotateColumns(Q=R))


def _embedding_and_head(stream: BlockStream) -> tuple[FoldedTensor, FoldedTensor]:
    """Where both come from and what they are called when they are no longer one tensor.

    Of two tied tensors one may be missing on disk, usually the head; the missing one gets its name in the model.
    """
    embedding, head = f"{stream.family.outside[0]}.weight", f"{stream.family.head}.weight"
    (one,), (other,) = stream.stored(embedding), stream.stored(head)
    names = (one, other)
    if one == other:
        names = (embedding, other) if other == head else (one, head)
    return FoldedTensor(name=names[0], origin=one, folds=()), FoldedTensor(name=names[1], origin=other, folds=())


def _gain(stream: BlockStream, name: str, offset: float) -> Float[Tensor, "channels=h"]:
    return stream.source.read_rows(stream.stored(name)).double() + offset
