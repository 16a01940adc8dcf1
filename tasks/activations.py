"""Activations: the grids of every site and point of attention, each block by one worker.

Ranges are quantiles over all images, so a block's activations are needed together: blocks are shared out, not images.
Every worker runs all images up to the last of its blocks and searches the grids of its own, which is what takes time.
What a block's grids are does not depend on who searches them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lrpq.activations.calibrate import Calibration, Means, Place, calibrate
from tasks.artifacts import StageFolder
from tasks.chosen_grids import ENDING, KIND, read_calibration, write_block
from tasks.images.stored import read_images
from tasks.profile_job import SQUARES
from tasks.store.opened import open_store
from tasks.store.tensors import read_tensors
from tasks.streams import StreamJob, open_stream
from tasks.worker import WorkerState

STAGE = "activations"


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationsJob:
    """Parameters of the stage; the same on every worker."""

    stream: StreamJob
    """The original model and its calibration images."""
    folder: StageFolder
    squares: StageFolder
    """Profile stage with the squared gradients that grids are judged by."""
    widths: tuple[int, ...]
    """Bits."""


def missing_blocks(job: ActivationsJob, num_blocks: int) -> list[int]:
    """Blocks whose grids are not stored."""
    present = set(open_store(job.stream.store).list(job.folder.prefix))
    return [block for block in range(num_blocks) if job.folder.block(KIND, block, ENDING) not in present]


def shares(blocks: Sequence[int], num_workers: int) -> list[list[int]]:
    """Blocks a worker, dealt out in turn."""
    return [list(blocks[start::num_workers]) for start in range(min(num_workers, len(blocks)))]


def search(state: WorkerState, job: ActivationsJob, blocks: list[int]) -> None:
    """Find the grids of some blocks, storing each block's when they are found."""
    store = open_store(job.stream.store)
    squares = {block: read_tensors(store, job.squares.block(SQUARES, block, "safetensors")) for block in blocks}

    def keep(block: int, places: Mapping[tuple[int, str], Place]) -> None:
        if places:
            write_block(store, job.folder, block, places)
        state.beat()

    calibrate(
        open_stream(state, job.stream),
        read_images(store, job.stream.windows),
        widths=job.widths,
        means=Means.ALL,
        token_weights=squares,
        micro_batch=job.stream.micro_batch,
        blocks=blocks,
        on_block=keep,
    )


def stored_calibration(job: ActivationsJob, blocks: Sequence[int]) -> Calibration:
    """All grids, from the store."""
    return read_calibration(open_store(job.stream.store), job.folder, blocks)
