"""Opening the model and a worker's shards of the calibration windows: what every streaming stage begins with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lrpq.model.host_copies import HostCopies
from lrpq.model.layers import LinearSpec
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.source import open_source
from lrpq.model.streaming import BlockStream
from lrpq.relevance.sweep import Shard
from lrpq.shards import assign, split
from lrpq.transform.changed import UNCHANGED, Change, changed_as_stored, open_changed
from tasks.calibration.stored import read_windows
from tasks.chosen_grids import ChosenGrids, fold
from tasks.device_copies import read_to_device
from tasks.images.stored import read_images
from tasks.store.opened import open_store
from tasks.worker import WorkerState

COPIES = "copies"
"""Under which a worker holds them."""
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
    """Tokens of a window; of an image, those of the first block."""
    num_tokens: int
    """Of all windows."""
    num_shards: int
    micro_batch: int
    """Windows computed at once."""
    change: Change = UNCHANGED
    """How the model is changed as it is read."""
    images: bool = False
    """Whether the windows are images."""
    activations: ChosenGrids | None = None
    """Grids of activations, for which the model is folded as it is read."""

    @property
    def num_windows(self) -> int:
        """Of all shards."""
        return self.num_tokens // self.length


def open_source_of(job: StreamJob) -> ModelSource:
    """The model, changed or folded if it is to be."""
    source = open_changed(Path(job.model), job.change)
    return source if job.activations is None else fold(source, job.activations)


def open_stream(state: WorkerState, job: StreamJob) -> BlockStream:
    """The model, changed or folded if it is to be, streamed on this worker's device."""
    source = open_source_of(job)
    return BlockStream(
        source,
        dtype=DTYPES[job.dtype],
        device=state.device,
        low_memory=state.low_memory,
        threads=state.host_threads,
    )


def open_copies(state: WorkerState) -> HostCopies | None:
    """What a sweep brings to the host that is not at work, in low memory on a GPU; ``close_copies`` ends it."""
    if not state.low_memory or state.device == "cpu":
        return None
    copies = HostCopies(torch.device(state.device))
    state.held[COPIES] = copies
    return copies


def open_reference(
    state: WorkerState, *, model: str, dtype: str, change: Change
) -> tuple[BlockStream, BlockStream | None]:
    """What variants are measured against, and the model whose variants they are if that is another one.

    The reference is never changed. The other model is as a checkpoint stores it: tensors that are not quantized have
    been rounded to their dtype.
    """
    source = open_source(Path(model))
    reference = BlockStream(source, dtype=DTYPES[dtype], device=state.device, threads=state.host_threads)
    if not change:
        return reference, None
    other = changed_as_stored(source, change)
    return reference, BlockStream(other, dtype=DTYPES[dtype], device=state.device)


def held_source(state: WorkerState, job: StreamJob) -> ModelSource:
    """The model's tensors, opened once by a worker as long as its files are the same: opening reads every header."""
    files = sorted(path for path in Path(job.model).iterdir() if path.suffix in (".safetensors", ".json"))
    identity = [
        (job.model, job.change, job.activations, path.name, path.stat().st_size, path.stat().st_mtime_ns)
        for path in files
    ]
    held: tuple[object, ModelSource] | None = state.held.get("source")
    if held is None or held[0] != identity:
        held = identity, open_source_of(job)
        state.held["source"] = held
    return held[1]


def read_weight(state: WorkerState, job: StreamJob, spec: LinearSpec) -> Tensor:
    """A layer's weights [d_out, d_in], float32, on the worker's device."""
    return read_to_device(held_source(state, job), spec.stored, state.device).to(torch.float32)


def my_shards(state: WorkerState, job: StreamJob) -> list[Shard]:
    """The shards this worker is responsible for."""
    store = open_store(job.store)
    windows = read_images(store, job.windows).to(DTYPES[job.dtype]) if job.images else read_windows(store, job.windows)
    spans = split(len(windows), job.num_shards)
    return [
        Shard(index=i, first_window=spans[i].start, tokens=windows[spans[i].start : spans[i].stop])
        for i in assign(job.num_shards, state.num_workers)[state.index]
    ]


def shard_slices(num_windows: int, length: int, num_shards: int) -> list[slice]:
    """Where each shard's tokens lie among the tokens of all windows."""
    return [slice(span.start * length, span.stop * length) for span in split(num_windows, num_shards)]
