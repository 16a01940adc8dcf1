"""Writing a transformed model: an ordinary model folder, streamed, published whole or not at all."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from lrpq.checkpoint.assemble import check_destination, check_space, write_beside_weights
from lrpq.checkpoint.layout import INDEX_FILE, StoredTensor, index_text, open_shard, plan_shards
from lrpq.checkpoint.patterns import natural_key
from lrpq.checkpoint.plan import MAX_SHARD_BYTES
from lrpq.checkpoint.publish import published_folder
from lrpq.errors import ConfigError
from lrpq.model.safetensors_source import ModelSource
from lrpq.transform.folds import FoldedTensor, FoldPlan, SkippedPair, folded


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformReport:
    """What a transform did."""

    folder: Path
    """The new model."""
    folded: tuple[str, ...]
    """Tensors of the new model that are not the source's, in natural order."""
    num_copied: int
    """Tensors taken over unchanged (but for ``dtype``)."""
    added: tuple[str, ...]
    """Tensors that the source does not have: an untied head."""
    skipped: tuple[SkippedPair, ...]
    """What the transform could have folded and left as it is."""
    source_bytes: int
    """Tensors of the source, headers apart."""
    written_bytes: int
    """Tensors of the new model, headers apart."""


def write_folded(
    source: ModelSource,
    output: Path,
    plan: FoldPlan,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> TransformReport:
    """Write the model that a plan describes; one tensor at a time is in memory.

    Args:
        source: the original.
        output: a new or empty folder.
        plan: what every tensor becomes.
        dtype: of the written floating-point tensors; by default each keeps its own.
        max_shard_bytes: bytes of tensors in a file; a larger tensor has a file of its own.

    Raises:
        ConfigError: the output is taken, the disk is too small, or the size of a shard is not positive.
        CheckpointError: a value leaves the dtype's range, or writing failed.
    """
    if max_shard_bytes < 1:
        raise ConfigError(f"max_shard_bytes is {max_shard_bytes}; expected a positive number of bytes")
    output = check_destination(source, output)
    copied = {name: FoldedTensor(name=name, origin=name, folds=()) for name in source.names()}
    made = copied | dict(plan.tensors)
    names = sorted(made, key=natural_key)
    stored = {name: _stored(source, made[name], dtype) for name in names}
    shards = plan_shards([(stored[name],) for name in names], max_shard_bytes=max_shard_bytes)
    texts = {"config.json": _config_text(source, plan, dtype)}
    if len(shards) > 1:
        num_parameters = sum(math.prod(tensor.shape) for tensor in stored.values())
        texts[INDEX_FILE] = index_text(shards, num_parameters=num_parameters)
    with published_folder(output) as folder:
        check_space(folder, output, sum(shard.nbytes for shard in shards))
        for shard in shards:
            with open_shard(folder, shard) as writer:
                for (tensor,) in shard.units:
                    values = source.read(made[tensor.name].origin)
                    if made[tensor.name].folds or values.dtype != tensor.dtype:
                        values = folded(values, made[tensor.name].folds, dtype=tensor.dtype, name=tensor.name)
                    writer.write(tensor.name, values)
        write_beside_weights(source, folder, texts, output=output)
    return TransformReport(
        folder=output,
        folded=tuple(name for name in names if name in plan.tensors),
        num_copied=len(names) - len(plan.tensors),
        added=tuple(name for name in names if name not in source),
        skipped=plan.skipped,
        source_bytes=sum(source.nbytes(name) for name in source.names()),
        written_bytes=sum(tensor.nbytes for tensor in stored.values()),
    )


def _stored(source: ModelSource, made: FoldedTensor, dtype: torch.dtype | None) -> StoredTensor:
    stored = source.dtype(made.origin)
    if dtype is not None and stored.is_floating_point:
        stored = dtype
    return StoredTensor(name=made.name, dtype=stored, shape=tuple(source.shape(made.origin)))


def _config_text(source: ModelSource, plan: FoldPlan, dtype: torch.dtype | None) -> str:
    document = source.config_document() | dict(plan.config_changes)
    if dtype is not None or getattr(source.config, "dtype", None) is None:
        document.pop("torch_dtype", None)
        document["dtype"] = str(dtype or source.main_dtype()).removeprefix("torch.")
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"
