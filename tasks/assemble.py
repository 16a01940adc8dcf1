"""Assemble: write the checkpoint from stored codes and prove it before it is published."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lrpq.allocate.targets import Target
from lrpq.checkpoint.assemble import manifest_text, write_checkpoint
from lrpq.checkpoint.formats import CheckpointFormat
from lrpq.checkpoint.publish import MANIFEST
from lrpq.checkpoint.verify import Verification, verify_checkpoint
from lrpq.model.host_memory import release_freed_memory
from lrpq.model.layers import HEAD, Choice, LinearSpec
from lrpq.quant.grid import QuantizedWeight
from lrpq.transform.changed import UNCHANGED, Change, open_changed
from tasks.artifacts import StageFolder
from tasks.candidates import CandidatesJob, read_candidate
from tasks.refine import read_refined
from tasks.store.opened import open_store
from tasks.worker import WorkerState

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
    format: str = CheckpointFormat.COMPRESSED_TENSORS.value
    """What quantized modules are stored as: ``compressed-tensors``, ``dense``, ``gptq`` or ``trellis``."""
    target: str = Target.TRANSFORMERS.value
    """What will load it: ``transformers`` or ``vllm``."""
    head: CandidatesJob | None = None
    """Where the head's codes are, if it is quantized: it is not refined."""
    change: Change = UNCHANGED
    """How the model is changed as it is read."""


def assemble(state: WorkerState, job: AssembleJob) -> dict[str, Any]:
    """Write and verify the checkpoint; returns its size and what was verified (``verified``).

    Raises:
        CheckpointError: the reloaded checkpoint differs from the codes; nothing is published.
    """
    source = open_changed(Path(job.model), job.change)
    stored = _loader(job)

    def load(name: str) -> QuantizedWeight | None:
        state.beat()
        return stored(name)

    written_as = CheckpointFormat(job.format)
    proof: list[Verification] = []

    def prove(folder: Path) -> None:
        proof.append(
            verify_checkpoint(folder, source, quantized=load, choices=job.choices, specs=job.specs, format=written_as)
        )
        proved = manifest_text({**job.manifest, "verified": asdict(proof[0])})
        (folder / MANIFEST).write_text(proved, encoding="utf-8")

    size = write_checkpoint(
        source,
        Path(job.output),
        quantized=load,
        choices=job.choices,
        specs=job.specs,
        manifest=job.manifest,
        format=written_as,
        target=Target(job.target),
        overwrite=job.overwrite,
        prove=prove,
    )
    gc.collect()  # the whole models that were compared lie in cycles
    release_freed_memory()
    return {**asdict(size), "average_bits": size.average_bits, "verified": asdict(proof[0])}


def _loader(job: AssembleJob) -> Callable[[str], QuantizedWeight | None]:
    store = open_store(job.store)
    by_name = {spec.name: spec for spec in job.specs}

    def load(name: str) -> QuantizedWeight | None:
        choice = job.choices.get(name)
        if choice is None:
            return None
        spec = by_name[name]
        codes = job.head if spec.input_site == HEAD and job.head is not None else job.codes
        if isinstance(codes, StageFolder):
            return read_refined(store, codes, name, choice)
        return read_candidate(store, codes, spec, choice)

    return load
