"""A model from its config.json: its blocks' layers and what one micro-batch through a block takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lrpq.model.layers import LinearSpec
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.streaming import BlockStream
from lrpq.plan.kernels import output_chunks
from lrpq.plan.trace import BlockTrace, Traced, recorded_arguments, trace_block, trace_labels
from tasks.estimate.asked import Asked


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockKind:
    """Blocks that are alike."""

    indices: tuple[int, ...]
    specs: tuple[LinearSpec, ...]
    """Layers of the first of them, in the order of execution."""
    steps: tuple[tuple[LinearSpec, ...], ...]
    """Layers whose inputs one forward finds (BlockStream.steps)."""
    num_bytes: int
    """Of all its tensors in the dtype of the computation."""
    disk_bytes: int
    calibration: BlockTrace
    """One micro-batch of calibration windows."""
    measured: BlockTrace
    """One evaluation window."""
    held_out: BlockTrace
    """One calibration window."""
    weighs_tokens: bool
    """Whether the profile finds token weights and how outputs work together."""

    @property
    def count(self) -> int:
        """How many."""
        return len(self.indices)

    def sites(self) -> dict[str, tuple[LinearSpec, ...]]:
        """Input site -> its layers."""
        found: dict[str, list[LinearSpec]] = {}
        for spec in self.specs:
            found.setdefault(spec.input_site, []).append(spec)
        return {site: tuple(members) for site, members in found.items()}

    @property
    def hessian_bytes(self) -> int:
        """One set of its Hessians, float32, dense."""
        return sum(4 * members[0].d_in ** 2 for members in self.sites().values())

    @property
    def chunks(self) -> list[int]:
        """Rows of all matrices of output gradients' second moments; experts have none."""
        if not self.weighs_tokens:
            return []
        return [rows for spec in self.specs if not spec.routed for rows in output_chunks(spec.d_out)]

    @property
    def sums_bytes(self) -> int:
        """One set of all sums of squares, float32, dense."""
        return self.hessian_bytes + sum(4 * rows**2 for rows in self.chunks)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What planning needs of a model."""

    source: ModelSource
    stream: BlockStream
    specs: tuple[LinearSpec, ...]
    kinds: tuple[BlockKind, ...]
    hidden: int
    vocabulary: int
    itemsize: int
    """Bytes of a weight or an activation while computing."""
    head_bytes: int
    embedding_bytes: int
    labels: Traced
    """``asked.label_tokens`` tokens through the head, labels and gradient."""
    routed_share: float
    """Share of the tokens that an expert sees, if they are spread evenly; 1 without experts."""

    @property
    def num_blocks(self) -> int:
        """Decoder blocks."""
        return self.stream.num_blocks

    @property
    def num_weights(self) -> int:
        """Weights that can be quantized."""
        return sum(spec.num_weights for spec in self.specs)

    @property
    def disk_bytes(self) -> int:
        """Weight files of the original, headers left out."""
        return sum(self.source.nbytes(name) for name in self.source.names())

    @property
    def num_parameters(self) -> int:
        """All weights."""
        return sum(torch.Size(self.source.shape(name)).numel() for name in self.source.names())

    def share(self, spec: LinearSpec) -> float:
        """Share of the tokens that a layer sees."""
        return self.routed_share if spec.routed else 1.0

    def blocks(self) -> Iterator[BlockKind]:
        """The kind of every block, in order of kind."""
        for kind in self.kinds:
            yield from [kind] * kind.count


def model_shape(source: ModelSource, asked: Asked) -> ModelShape:
    """Build the skeleton and trace one block of each kind.

    Raises:
        ModelError: an architecture that lrpq does not know.
    """
    stream = BlockStream(source, dtype=asked.dtype)
    config = source.config.get_text_config()
    lengths = [asked.length] + ([asked.evaluated_length] if asked.evaluated_windows else [])
    arguments = recorded_arguments(stream, lengths)
    groups: dict[Any, list[int]] = {}
    for block in range(stream.num_blocks):
        mask = arguments[asked.length][block].get("attention_mask")
        shapes = tuple((s.input_site, s.d_out, s.d_in, s.routed) for s in stream.block_specs(block))
        groups.setdefault((shapes, mask is None), []).append(block)
    windows_of_shard = -(-asked.num_windows // asked.num_shards)
    micro_batch = min(asked.micro_batch, windows_of_shard)
    kinds = []
    for indices in groups.values():
        first = indices[0]

        def traced(windows: int, length: int, first: int = first) -> BlockTrace:
            return trace_block(
                stream,
                first,
                arguments[length][first],
                windows=windows,
                length=length,
                passes=asked.relevance.passes,
            )

        state = stream.blocks[first].state_dict()
        names = [f"{stream.family.blocks}.{first}.{name}" for name in state]
        kinds.append(
            BlockKind(
                indices=tuple(indices),
                specs=stream.block_specs(first),
                steps=tuple(stream.steps(first)),
                num_bytes=sum(t.numel() for t in state.values()) * asked.dtype.itemsize,
                disk_bytes=sum(source.nbytes(part) for name in names for part in stream.stored(name)),
                calibration=traced(micro_batch, asked.length),
                measured=traced(1, asked.evaluated_length if asked.evaluated_windows else asked.length),
                held_out=traced(1, asked.length),
                weighs_tokens=asked.weighs_tokens,
            )
        )
    head = stream.model.get_submodule(stream.family.head)
    vocabulary, hidden = head.weight.shape
    embedding = stream.model.get_input_embeddings().weight
    return ModelShape(
        source=source,
        stream=stream,
        specs=stream.specs,
        kinds=tuple(kinds),
        hidden=config.hidden_size,
        vocabulary=vocabulary,
        itemsize=asked.dtype.itemsize,
        head_bytes=vocabulary * hidden * asked.dtype.itemsize,
        embedding_bytes=embedding.numel() * asked.dtype.itemsize,
        labels=trace_labels(hidden, vocabulary, dtype=asked.dtype, tokens=min(asked.label_tokens, asked.length)),
        routed_share=_routed_share(config, stream.specs),
    )


def _routed_share(config: Any, specs: tuple[LinearSpec, ...]) -> float:
    routed = [spec for spec in specs if spec.routed]
    if not routed:
        return 1.0
    experts = len({spec.input_site for spec in routed if spec.block == routed[0].block}) // 2
    taken: Mapping[str, Any] = config.to_dict()
    return float(taken.get("num_experts_per_tok", experts)) / experts
