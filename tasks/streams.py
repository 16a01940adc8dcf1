"""Opening the model and a worker's shards of the calibration windows: what every streaming stage begins with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from lrpq.model.source import open_source
from lrpq.model.streaming import BlockStream
from lrpq.relevance.sweep import Shard
from lrpq.shards import assign, split
from tasks.calibration.stored import read_windows
from tasks.cluster import WorkerState
from tasks.store.opened import open_store

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamJob:
    """A model, its windows and how they are cut; the same on every worker."""

    model: str
    """Local folder."""
    dtype: str
    """``float32`` or ``bfloat16``: weights and activations."""
    store: str
    windows: str
    """Key of the calibration windows."""
    length: int
    """Tokens of a window."""
    num_tokens: int
    """Of all windows."""
    num_shards: int
    micro_batch: int
    """Windows computed at once."""
    num_workers: int


def open_stream(state: WorkerState, job: StreamJob) -> BlockStream:
    """The model, streamed on this worker's device."""
    return BlockStream(open_source(Path(job.model)), dtype=DTYPES[job.dtype], device=state.device)


def my_shards(state: WorkerState, job: StreamJob) -> list[Shard]:
    """The shards this worker is responsible for."""
    windows = read_windows(open_store(job.store), job.windows)
    spans = split(len(windows), job.num_shards)
    return [
        Shard(index=i, first_window=spans[i].start, tokens=windows[spans[i].start : spans[i].stop])
        for i in assign(job.num_shards, job.num_workers)[state.index]
    ]


def shard_slices(num_windows: int, length: int, num_shards: int) -> list[slice]:
    """Where each shard's tokens lie among the tokens of all windows."""
    return [slice(span.start * length, span.stop * length) for span in split(num_windows, num_shards)]
