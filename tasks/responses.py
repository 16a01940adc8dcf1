"""Responses: what every width of activations and every choice of a layer does to the predictions, on one scale.

The walk of lrpq/activations/directional.py over the model that is folded for one width of activations, its candidates'
codes and all its grids. A draw is one unit of work, by one worker, over all images: what a draw gives does not depend
on who makes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from lrpq.activations.directional import DRAWS, Costs, averaged, responses
from lrpq.model.layers import Choice, LinearSpec
from lrpq.quant.grid import QuantizedWeight
from tasks.artifacts import StageFolder
from tasks.candidates import CandidatesJob, read_candidate
from tasks.chosen_grids import read_calibration
from tasks.images.stored import read_images
from tasks.store.objects import ObjectStore
from tasks.store.opened import open_store
from tasks.store.tables import read_table, write_table
from tasks.streams import DTYPES, StreamJob, open_stream
from tasks.worker import WorkerState

STAGE = "responses"
UNITS = {
    "cost_nats": "nats per image",
    "block": "of a place of activations; -1 of a layer",
    "bits": "bits per code",
    "group_size": "columns per scale, -1 is all; 0 of activations",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponsesJob:
    """Parameters of the stage; the same on every worker."""

    stream: StreamJob
    """The model, folded, and its calibration images."""
    folder: StageFolder
    candidates: CandidatesJob
    """Codes of the folded model's layers."""
    seed: int


def missing_draws(job: ResponsesJob) -> list[int]:
    """Draws that are not stored."""
    present = set(open_store(job.stream.store).list(job.folder.prefix))
    return [draw for draw in range(DRAWS) if _key(job, draw) not in present]


def respond(state: WorkerState, job: ResponsesJob, draw: int) -> None:
    """Walk back from one draw and store what everything costs by it."""
    store, chosen = open_store(job.stream.store), job.stream.activations
    assert chosen is not None
    stream = open_stream(state, job.stream)
    calibration = read_calibration(store, chosen.folder, range(chosen.num_blocks))
    found = responses(
        stream,
        read_images(store, job.stream.windows).to(DTYPES[job.stream.dtype]),
        calibration.grids_on_folded(chosen.by_place()),
        _StoredWeights(store, job.candidates, {spec.name: spec for spec in stream.specs}),
        seed=job.seed,
        draws=[draw],
        micro_batch=job.stream.micro_batch,
        kept_bytes=state.kept_bytes,
        on_batch=state.beat,
    ).costs()
    rows: list[dict[str, Any]] = [
        {"block": block, "name": name, "bits": bits, "group_size": 0, "cost_nats": cost}
        for (block, name, bits), cost in found.places.items()
    ]
    rows += [
        {"block": -1, "name": name, "bits": choice.bits, "group_size": choice.group_size, "cost_nats": cost}
        for (name, choice), cost in found.modules.items()
    ]
    write_table(store, _key(job, draw), pa.Table.from_pylist(rows), units=UNITS, kind=STAGE)


def read_responses(job: ResponsesJob) -> Costs:
    """Mean over the draws.

    Raises:
        StoreError: an object is not there, or damaged.
    """
    store = open_store(job.stream.store)
    return averaged([_costs(read_table(store, _key(job, draw), kind=STAGE).to_pylist()) for draw in range(DRAWS)])


def _costs(rows: Sequence[Mapping[str, Any]]) -> Costs:
    return Costs(
        places={(row["block"], row["name"], row["bits"]): row["cost_nats"] for row in rows if row["block"] >= 0},
        modules={
            (row["name"], Choice(bits=row["bits"], group_size=row["group_size"])): row["cost_nats"]
            for row in rows
            if row["block"] < 0
        },
    )


def _key(job: ResponsesJob, draw: int) -> str:
    return job.folder.object(f"draw-{draw}.parquet")


class _StoredWeights(Mapping[str, Sequence[QuantizedWeight]]):
    """Candidates' codes by module, read when they are asked for."""

    def __init__(self, store: ObjectStore, job: CandidatesJob, specs: Mapping[str, LinearSpec]) -> None:
        self._store, self._job, self._specs = store, job, specs

    def __getitem__(self, name: str) -> Sequence[QuantizedWeight]:
        spec = self._specs[name]
        choices = [choice for choice in self._job.choices if choice.fits(spec.d_in)]
        return [read_candidate(self._store, self._job, spec, choice) for choice in choices]

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)
