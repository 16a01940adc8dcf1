"""Evaluate: perplexity and KL divergence of the result and of the control, windows shared out over the workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from lrpq.checkpoint.stored import StoredCheckpoint
from lrpq.evaluate.divergence import WindowScore, score_windows, summarize
from lrpq.model.layers import Choice, LinearSpec
from lrpq.model.streaming import BlockStream
from tasks.artifacts import StageFolder
from tasks.cluster import WorkerState
from tasks.refine import read_refined
from tasks.store.opened import open_store
from tasks.streams import StreamJob, my_shards, open_stream

__all__ = ["CheckpointCodes", "EvaluateJob", "StoredCodes", "merged_scores", "score", "summarize"]

STAGE = "evaluate"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredCodes:
    """A variant whose codes lie in the store."""

    folder: StageFolder
    choices: Mapping[str, Choice | None]


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


def score(state: WorkerState, job: EvaluateJob) -> dict[int, dict[str, list[dict[str, float]]]]:
    """Score this worker's shards; returns shard -> variant -> one row a window."""
    stream = open_stream(state, job.stream)
    scores: dict[int, dict[str, list[dict[str, float]]]] = {}
    for shard in my_shards(state, job.stream):
        if len(shard.tokens):
            variants = {name: _weights(stream, job.stream.store, v) for name, v in job.variants.items()}
            found = score_windows(stream, shard.tokens, variants, micro_batch=job.stream.micro_batch)
            scores[shard.index] = {name: [asdict(s) for s in rows] for name, rows in found.items()}
    return scores


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
        checkpoint = StoredCheckpoint(Path(variant.path))

        def from_checkpoint(block: int) -> dict[str, Tensor]:
            return {
                spec.name: weight.dequantize(stream.dtype)
                for spec in stream.block_specs(block)
                if (weight := checkpoint.codes(spec.name)) is not None
            }

        return from_checkpoint
    store = open_store(store_url)

    def from_store(block: int) -> dict[str, Tensor]:
        def dense(spec: LinearSpec, choice: Choice) -> Tensor:
            weight: Tensor = read_refined(store, variant.folder, spec.name, choice).dequantize(stream.dtype)
            return weight

        return {
            spec.name: dense(spec, choice)
            for spec in stream.block_specs(block)
            if (choice := variant.choices[spec.name]) is not None
        }

    return from_store
