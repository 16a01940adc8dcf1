"""Top-1 and KL divergence of variants of an image classifier, images shared out over the workers.

Images go in batches of a fixed size, so their scores do not depend on which of them a worker holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lrpq.activations.apply import quantized_block
from lrpq.classifier import read_classifier
from lrpq.evaluate.classification import ImageScores, Variant, score_images
from lrpq.model.layers import Choice
from lrpq.model.source import open_source
from lrpq.model.streaming import BlockStream
from lrpq.shards import assign
from tasks.chosen_grids import read_grids
from tasks.images.stored import read_images, read_labels
from tasks.store.opened import open_store
from tasks.stored_codes import CodesFrom, read_codes
from tasks.streams import DTYPES, StreamJob, open_stream
from tasks.worker import WorkerState

BATCH = 50
"""Images computed at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredClassifierCodes:
    """A variant whose codes lie in the store."""

    stream: StreamJob
    """The model that they are of, folded where activations are quantized."""
    folder: CodesFrom
    choices: Mapping[str, Choice | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifierCheckpoint:
    """A variant that is a written checkpoint."""

    path: str


ClassifierVariant = StoredClassifierCodes | ClassifierCheckpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreImagesJob:
    """Parameters of the stage; the same on every worker."""

    model: str
    """Local folder of the original."""
    dtype: str
    store: str
    images: str
    """Key of the images."""
    num_images: int
    variants: Mapping[str, ClassifierVariant]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSummary:
    """Scores over all images."""

    top1: float | None
    """Share of images whose likeliest class is theirs; None where images have no labels."""
    agreement: float
    """Share of images whose likeliest class is the original's."""
    kl_nats: float
    """KL(original || variant), mean over images, nats an image."""
    kl_standard_error: float | None
    """Of that mean; None with one image."""


def score(state: WorkerState, job: ScoreImagesJob) -> dict[int, dict[str, list[tuple[bool, bool, float]]]]:
    """Score this worker's batches; first batch -> variant -> (right, agrees, KL) an image."""
    batches = assign(math.ceil(job.num_images / BATCH), state.num_workers)[state.index]
    if not len(batches):
        return {}
    store = open_store(job.store)
    mine = slice(batches.start * BATCH, min(batches.stop * BATCH, job.num_images))
    pixels, labels = read_images(store, job.images)[mine], read_labels(store, job.images)[mine]
    stream = BlockStream(open_source(Path(job.model)), dtype=DTYPES[job.dtype], device=state.device)
    dtype = stream.dtype
    variants = {name: _variant(state, variant, dtype) for name, variant in job.variants.items()}
    found = score_images(stream, pixels.to(dtype), labels, variants, micro_batch=BATCH)
    return {batches.start: {name: _rows(scores) for name, scores in found.items()}}


def _rows(scores: ImageScores) -> list[tuple[bool, bool, float]]:
    return list(zip(scores.right.tolist(), scores.agrees.tolist(), scores.kl_nats.tolist(), strict=True))


def _variant(state: WorkerState, variant: ClassifierVariant, dtype: torch.dtype) -> tuple[BlockStream, Variant]:
    if isinstance(variant, ClassifierCheckpoint):
        stored = read_classifier(variant.path, dtype=dtype, device=state.device)
        return stored.stream, _beating(state, stored.variant)
    stream, store = open_stream(state, variant.stream), open_store(variant.stream.store)
    chosen = variant.stream.activations
    grids = ({},) * stream.num_blocks if chosen is None else read_grids(chosen)

    def of_block(index: int, block: nn.Module) -> AbstractContextManager[None]:
        specs = stream.block_specs(index)
        found = {
            spec.name: read_codes(store, variant.folder, spec, choice)
            for spec in specs
            if (choice := variant.choices[spec.name]) is not None
        }
        return quantized_block(stream, index, block, grids[index], found)

    return stream, _beating(state, of_block)


def _beating(state: WorkerState, variant: Variant) -> Variant:
    def of_block(index: int, block: nn.Module) -> AbstractContextManager[None]:
        state.beat()
        return variant(index, block)

    return of_block


def merged(
    parts: Sequence[Mapping[int, Mapping[str, Sequence[tuple[bool, bool, float]]]]],
) -> dict[str, list[tuple[bool, bool, float]]]:
    """Scores of all images in order, by variant."""
    found: dict[str, list[tuple[bool, bool, float]]] = {}
    for _, scores in sorted((first, scores) for part in parts for first, scores in part.items()):
        for name, rows in scores.items():
            found.setdefault(name, []).extend(rows)
    return found


def summarize(rows: Sequence[tuple[bool, bool, float]], *, labelled: bool) -> ImageSummary:
    """Means over images, with the standard error of the KL divergence."""
    n = len(rows)
    kl = [row[2] for row in rows]
    return ImageSummary(
        top1=sum(row[0] for row in rows) / n if labelled else None,
        agreement=sum(row[1] for row in rows) / n,
        kl_nats=math.fsum(kl) / n,
        kl_standard_error=_standard_error(kl),
    )


def paired_error(ours: Sequence[tuple[bool, bool, float]], theirs: Sequence[tuple[bool, bool, float]]) -> float | None:
    """Standard error of the mean difference of two variants' KL divergences on the same images; None with one."""
    return _standard_error([a[2] - b[2] for a, b in zip(ours, theirs, strict=True)])


def _standard_error(values: Sequence[float]) -> float | None:
    n = len(values)
    if n == 1:
        return None
    mean = math.fsum(values) / n
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)
