"""Rebuild: walk the blocks in order and learn each one's codes, scales and activation steps on its outputs' error.

It begins with the codes that an earlier stage has made for all blocks; a block is rebuilt behind the rebuilt ones
before it (lrpq/tune/reconstruct.py). One worker does it: a block waits for the one before it, and a step of the
optimizer for the step before it.

A block's object is written behind its modules', so a block that has one is complete. What goes on from there takes
the gradients again, which nothing stores, and runs the complete blocks with what is stored of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lrpq.model.kept import KeptInputs
from lrpq.model.layers import Choice
from lrpq.model.streaming import BlockStream
from lrpq.quant.grid import QuantizedWeight
from lrpq.quant.packing import pack
from lrpq.tune.block import Start
from lrpq.tune.options import Reconstruction
from lrpq.tune.reconstruct import BlockOutcome, Rebuilder
from tasks.artifacts import StageFolder
from tasks.chosen_grids import read_grids, rebuilt_key
from tasks.device_copies import to_host
from tasks.images.stored import read_images
from tasks.store.opened import open_store
from tasks.store.tensors import read_metadata, write_tensors
from tasks.stored_codes import CodesFrom, read_codes
from tasks.stored_grids import read_block_grids, write_block_grids
from tasks.streams import DTYPES, StreamJob, open_stream
from tasks.worker import WorkerState

STAGE = "rebuild"
OUTCOME = "outcome"
"""Under which a block's object has what was found (BlockOutcome)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RebuildJob:
    """Parameters of the stage."""

    stream: StreamJob
    """The model and its calibration images, with the grids that it begins with where activations are quantized."""
    folder: StageFolder
    codes: CodesFrom
    """What it begins with."""
    choices: Mapping[str, Choice | None]
    """Module name -> choice; None is left as it is."""
    options: Reconstruction
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Walk:
    """What the worker holds between two blocks."""

    stream: BlockStream
    rebuilder: Rebuilder
    kept: KeptInputs


def num_complete(job: RebuildJob, num_blocks: int) -> int:
    """Blocks from the first one on that are stored."""
    present = set(open_store(job.stream.store).list(job.folder.prefix))
    return next((block for block in range(num_blocks) if rebuilt_key(job.folder, block) not in present), num_blocks)


def begin(state: WorkerState, job: RebuildJob, first: int) -> None:
    """Take the gradients and bring the images in front of block ``first``, behind the blocks that are stored."""
    store, stream = open_store(job.stream.store), open_stream(state, job.stream)
    chosen = job.stream.activations
    kept = KeptInputs(memory_bytes=state.kept_bytes, folder=state.spill_folder)
    try:
        rebuilder = Rebuilder(
            stream,
            read_images(store, job.stream.windows).to(DTYPES[job.stream.dtype]),
            ({},) * stream.num_blocks if chosen is None else read_grids(chosen),
            job.options,
            seed=job.seed,
            micro_batch=job.stream.micro_batch,
            kept=kept,
            on_step=state.beat,
        )
        for block, module in stream.stream(range(first)):
            grids = read_block_grids(store, rebuilt_key(job.folder, block))
            rebuilder.pass_by(block, module, Start(codes=_codes(job, job.folder, stream, block), grids=grids))
    except BaseException:
        kept.close()
        raise
    state.held[STAGE] = _Walk(stream=stream, rebuilder=rebuilder, kept=kept)
    state.held["blocks"] = stream.stream(range(first, stream.num_blocks))


def rebuild(state: WorkerState, job: RebuildJob, block: int) -> None:
    """Rebuild a block and store what was made of it."""
    walk: _Walk = state.held[STAGE]
    index, module = next(state.held["blocks"])
    if index != block:
        raise RuntimeError(f"reconstruction is at block {index}, asked for {block}")
    made = walk.rebuilder(block, module, _codes(job, job.codes, walk.stream, block))
    store = open_store(job.stream.store)
    for name, weight in made.items():
        codes, scales = to_host(weight.codes), to_host(weight.scales)
        on_host = QuantizedWeight(codes=codes, scales=scales, choice=weight.choice)
        choice = {field: str(value) for field, value in asdict(weight.choice).items()}
        write_tensors(store, job.folder.module(name), pack(on_host), choice)
    outcome = json.dumps(asdict(walk.rebuilder.outcomes[-1]), allow_nan=False)
    write_block_grids(store, rebuilt_key(job.folder, block), walk.rebuilder.grids[block], {OUTCOME: outcome})


def end(state: WorkerState) -> None:
    """Free what the stage holds."""
    state.held.pop("blocks").close()
    walk: _Walk = state.held.pop(STAGE)
    walk.kept.close()


def read_outcomes(job: RebuildJob, blocks: Sequence[int]) -> list[BlockOutcome]:
    """What was found, by block."""
    store = open_store(job.stream.store)
    found: list[dict[str, Any]] = [
        json.loads(read_metadata(store, rebuilt_key(job.folder, block))[OUTCOME]) for block in blocks
    ]
    return [BlockOutcome(**outcome) for outcome in found]


def _codes(job: RebuildJob, codes: CodesFrom, stream: BlockStream, block: int) -> dict[str, QuantizedWeight]:
    """Of a block's modules that have any."""
    store = open_store(job.stream.store)
    return {
        spec.name: read_codes(store, codes, spec, choice)
        for spec in stream.block_specs(block)
        if (choice := job.choices[spec.name]) is not None
    }
