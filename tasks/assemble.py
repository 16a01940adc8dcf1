"""Assemble: write the checkpoint from stored codes and prove it before it is published."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lrpq.checkpoint.assemble import write_checkpoint
from lrpq.checkpoint.verify import verify_checkpoint
from lrpq.model.layers import Choice, LinearSpec
from lrpq.model.safetensors_source import ModelSource
from lrpq.quant.grid import QuantizedWeight
from tasks.artifacts import StageFolder
from tasks.candidates import CandidatesJob, read_candidate
from tasks.cluster import WorkerState
from tasks.refine import read_refined
from tasks.store.opened import open_store

STAGE = "assemble"


@dataclass(frozen=True, slots=True, kw_only=True)
class AssembleJob:
    """What is written where."""

    model: str
    store: str
    output: str
    overwrite: bool
    codes: StageFolder | CandidatesJob
    """Refined codes, or the candidates they are stitched from."""
    choices: Mapping[str, Choice]
    """Quantized modules only."""
    specs: tuple[LinearSpec, ...]
    manifest: Mapping[str, Any]


def assemble(state: WorkerState, job: AssembleJob) -> dict[str, Any]:
    """Write and verify the checkpoint; returns its size and what was verified.

    Raises:
        CheckpointError: the reloaded checkpoint differs from the codes; nothing is published.
    """
    source = ModelSource(Path(job.model))
    load = _loader(job)

    def prove(folder: Path) -> None:
        verify_checkpoint(folder, source, quantized=load, choices=job.choices)

    size = write_checkpoint(
        source,
        Path(job.output),
        quantized=load,
        choices=job.choices,
        manifest=job.manifest,
        overwrite=job.overwrite,
        prove=prove,
    )
    return {**asdict(size), "average_bits": size.average_bits}


def _loader(job: AssembleJob) -> Callable[[str], QuantizedWeight | None]:
    store = open_store(job.store)
    by_name = {spec.name: spec for spec in job.specs}
    codes = job.codes

    def load(name: str) -> QuantizedWeight | None:
        choice = job.choices.get(name)
        if choice is None:
            return None
        if isinstance(codes, StageFolder):
            return read_refined(store, codes, name, choice)
        return read_candidate(store, codes, by_name[name], choice)

    return load
