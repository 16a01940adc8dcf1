"""Evaluate: perplexity and KL divergence of the result and of the control, windows shared out over the workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from lrpq.checkpoint.modules import WEIGHT
from lrpq.checkpoint.publish import MANIFEST
from lrpq.checkpoint.stored import StoredCheckpoint
from lrpq.errors import CheckpointError
from lrpq.evaluate.divergence import WindowScore, score_windows, summarize
from lrpq.model.layers import HEAD, Choice, LinearSpec
from lrpq.model.streaming import BlockStream
from lrpq.transform.changed import Change, open_changed
from tasks.artifacts import StageFolder
from tasks.candidates import CandidatesJob, read_candidate
from tasks.refine import read_refined
from tasks.store.opened import open_store
from tasks.streams import StreamJob, my_shards, open_reference
from tasks.worker import WorkerState

__all__ = [
    "CheckpointCodes",
    "EvaluateJob",
    "StoredCodes",
    "check_changed",
    "checkpoint_weights",
    "merged_scores",
    "score",
    "summarize",
]

STAGE = "evaluate"
ROTATED_DIFFERENCE = 0.02
"""Of an embedding's norm: bfloat16 rounds by .002 of it; two unrelated matrices differ by 1.4."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredCodes:
    """A variant whose codes lie in the store: refined ones, or candidates."""

    folder: StageFolder | CandidatesJob
    choices: Mapping[str, Choice | None]
    head: CandidatesJob | None = None
    """Where the head's codes are, if it is quantized."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointCodes:
    """A variant that is a written checkpoint."""

    path: str


Variant = StoredCodes | CheckpointCodes


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateJob:
    """Parameters of the stage; the same on every worker."""

    stream: StreamJob
    variants: Mapping[str, Variant]
    stride: int = 1
    """The first of every so many shards is scored."""


def score(state: WorkerState, job: EvaluateJob) -> dict[int, dict[str, list[dict[str, float]]]]:
    """Score this worker's windows in one pass over the blocks; returns shard -> variant -> one row a window.

    Windows are computed one by one, so their scores do not depend on which of them a worker holds.
    """
    mine = my_shards(state, job.stream)
    shards = [shard for shard in mine if len(shard.tokens) and shard.index % job.stride == 0]
    if not shards:
        return {}
    asked = job.stream
    stream, other = open_reference(state, model=asked.model, dtype=asked.dtype, change=asked.change)
    weights = {name: _weights(other or stream, job.stream.store, v) for name, v in job.variants.items()}
    variants = {name: _beating(state, of_block) for name, of_block in weights.items()}
    found = score_windows(stream, torch.cat([shard.tokens for shard in shards]), variants, micro_batch=1, other=other)
    scores: dict[int, dict[str, list[dict[str, float]]]] = {}
    taken = 0
    for shard in shards:
        rows = slice(taken, taken + len(shard.tokens))
        scores[shard.index] = {name: [asdict(row) for row in of_all[rows]] for name, of_all in found.items()}
        taken = rows.stop
    return scores


def _beating(state: WorkerState, weights: Callable[[int], dict[str, Tensor]]) -> Callable[[int], dict[str, Tensor]]:
    """The same function, with a sign of life at every block that is asked for."""

    def of_block(block: int) -> dict[str, Tensor]:
        state.beat()
        return weights(block)

    return of_block


def merged_scores(parts: list[dict[int, dict[str, list[dict[str, float]]]]]) -> dict[str, list[WindowScore]]:
    """Scores of all windows in order, by variant."""
    by_shard = {shard: rows for part in parts for shard, rows in part.items()}
    merged: dict[str, list[WindowScore]] = {}
    for shard in sorted(by_shard):
        for name, rows in by_shard[shard].items():
            merged.setdefault(name, []).extend(WindowScore(**row) for row in rows)
    return merged


def _weights(stream: BlockStream, store_url: str, variant: Variant) -> Callable[[int], dict[str, Tensor]]:
    if isinstance(variant, CheckpointCodes):
        return checkpoint_weights(stream, Path(variant.path))
    store = open_store(store_url)

    def from_store(block: int) -> dict[str, Tensor]:
        def dense(spec: LinearSpec, choice: Choice) -> Tensor:
            if spec.input_site == HEAD and variant.head is not None:
                codes = read_candidate(store, variant.head, spec, choice)
            elif isinstance(variant.folder, CandidatesJob):
                codes = read_candidate(store, variant.folder, spec, choice)
            else:
                codes = read_refined(store, variant.folder, spec.name, choice)
            weight: Tensor = codes.dequantize(stream.dtype)
            return weight

        if block == stream.num_blocks and variant.head is None:
            return {}

        return {
            spec.name: dense(spec, choice)
            for spec in _specs(stream, block)
            if (choice := variant.choices[spec.name]) is not None
        }

    return from_store


def checkpoint_weights(stream: BlockStream, folder: Path) -> Callable[[int], dict[str, Tensor]]:
    """Block -> dense weights of a written checkpoint; behind the last block its head's.

    Raises:
        CheckpointError: not a checkpoint of ours, or of another model than the stream's.
    """
    checkpoint = StoredCheckpoint(folder)
    _check_belongs(checkpoint, stream)

    def of_block(block: int) -> dict[str, Tensor]:
        return {
            spec.name: weight
            for spec in _specs(stream, block)
            if (weight := checkpoint.weight(spec, stream.dtype)) is not None
        }

    return of_block


def check_changed(folder: Path, model: Path, change: Change) -> None:
    """Compare a checkpoint's embedding with the rotated one of the model that it is to be measured against.

    Two machines may round a value differently; what another rotation or another model gives has nothing in common.
    Without a rotation nothing is drawn again, and nothing is compared.

    Raises:
        CheckpointError: they are different.
        ModelError: the model cannot be changed so.
    """
    source = open_changed(model, change)
    if change.rotation is None:
        return
    stream = BlockStream(source, dtype=torch.float32)
    (name,) = stream.stored(f"{stream.family.outside[0]}.weight")
    found, expected = StoredCheckpoint(folder).dense(name.removesuffix(WEIGHT)), stream.source.read_rows([name])
    near = found.shape == expected.shape and float((found - expected).norm()) <= ROTATED_DIFFERENCE * float(
        expected.norm()
    )
    if not near:  # as where a value is no number
        raise CheckpointError(
            f"tensor {name} in {folder}: is not that of {model} under the rotation that {MANIFEST} names; give the "
            "model that the checkpoint was made from"
        )


def _specs(stream: BlockStream, block: int) -> tuple[LinearSpec, ...]:
    """Layers of a block; of the block behind the last one, the head."""
    if block < stream.num_blocks:
        return stream.block_specs(block)
    return () if stream.head_spec is None else (stream.head_spec,)


def _check_belongs(checkpoint: StoredCheckpoint, stream: BlockStream) -> None:
    """Refuse a checkpoint of another model: what it does not name would be scored as the original."""
    specs = (*stream.specs, *_specs(stream, stream.num_blocks))
    known = {stored.removesuffix(WEIGHT) for spec in specs for stored in spec.stored}
    foreign = [name for name in checkpoint.modules() if name not in known]
    if foreign:
        raise CheckpointError(
            f"module {foreign[0]} in {checkpoint.folder}: is none of {stream.source.folder}; give the model that the "
            "checkpoint was made from"
        )
