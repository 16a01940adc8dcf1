"""Assemble an image classifier: write it from stored codes and grids, and prove it before it is published."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lrpq.checkpoint.activations import StoredActivations, stored_activations
from lrpq.checkpoint.assemble import manifest_text
from lrpq.checkpoint.publish import MANIFEST
from lrpq.classifier import ClassifierProof, verify_classifier, write_classifier
from lrpq.model.host_memory import release_freed_memory
from lrpq.model.layers import Choice, LinearSpec
from lrpq.quant.grid import QuantizedWeight
from tasks.chosen_grids import ChosenGrids, read_grids
from tasks.store.opened import open_store
from tasks.stored_codes import CodesFrom, read_codes
from tasks.streams import StreamJob, open_source_of
from tasks.worker import WorkerState


@dataclass(frozen=True, slots=True, kw_only=True)
class AssembleClassifierJob:
    """What is written where."""

    stream: StreamJob
    """The model, with the grids of its activations."""
    output: str
    overwrite: bool
    codes: CodesFrom
    choices: Mapping[str, Choice]
    """Quantized modules only."""
    specs: tuple[LinearSpec, ...]
    manifest: Mapping[str, Any]


def assemble(state: WorkerState, job: AssembleClassifierJob) -> dict[str, Any]:
    """Write and verify the checkpoint; returns its size and what was verified (``verified``).

    Raises:
        CheckpointError: the reloaded checkpoint differs from the codes; nothing is published.
    """
    source, store = open_source_of(job.stream), open_store(job.stream.store)
    by_name = {spec.name: spec for spec in job.specs}
    grids = () if job.stream.activations is None else read_grids(job.stream.activations)
    proof: list[ClassifierProof] = []

    def load(name: str) -> QuantizedWeight | None:
        state.beat()
        choice = job.choices.get(name)
        return None if choice is None else read_codes(store, job.codes, by_name[name], choice)

    def prove(folder: Path) -> None:
        proof.append(
            verify_classifier(folder, source, quantized=load, choices=job.choices, specs=job.specs, grids=grids)
        )
        proved = manifest_text({**job.manifest, "verified": asdict(proof[0])})
        (folder / MANIFEST).write_text(proved, encoding="utf-8")

    size = write_classifier(
        source,
        Path(job.output),
        quantized=load,
        choices=job.choices,
        specs=job.specs,
        grids=grids,
        manifest=job.manifest,
        overwrite=job.overwrite,
        prove=prove,
    )
    gc.collect()  # the whole models that were compared lie in cycles
    release_freed_memory()
    return {
        **asdict(size),
        "average_bits": size.quantized_bits / size.num_quantized_weights,
        "verified": asdict(proof[0]),
    }


def checkpoint_activations(
    specs: tuple[LinearSpec, ...], chosen: ChosenGrids | None, choices: Mapping[str, Choice]
) -> StoredActivations | None:
    """The grids as they lie in the checkpoint; None where there are none."""
    return None if chosen is None else stored_activations(specs, read_grids(chosen), packed=choices)
