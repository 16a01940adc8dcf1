"""Reconstruction of an image classifier's blocks behind their codes: the stage, and what is said of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from flows.run import Run
from lrpq.tune.reconstruct import BlockOutcome
from tasks import rebuild
from tasks.candidates import CandidatesJob
from tasks.chosen_grids import rebuilt_with
from tasks.cluster import Pool
from tasks.rebuild import RebuildJob
from tasks.stored_codes import CodesFrom
from tasks.streams import StreamJob

REBUILT, AS_ROUNDED = "rebuilt", "rounded"
CHECK = "rebuild, checked"
"""What the comparison of both on held-out images is called."""


def run_rebuild(run: Run, pool: Pool, job: RebuildJob, num_blocks: int) -> Mapping[str, Any]:
    """Walk the blocks; returns what the manifest says of it. Blocks already in the store are not redone."""
    label = rebuild.STAGE
    done = run.stored(job.folder, label)
    if done is None:
        run.survive(pool, label, lambda: _rebuild(run, pool, job, num_blocks))
        found = reconstruction_json(rebuild.read_outcomes(job, range(num_blocks)))
        done = run.finish(job.folder, label, {"reconstruction": found})
    reconstruction: Mapping[str, Any] = done["reconstruction"]
    return reconstruction


def _rebuild(run: Run, pool: Pool, job: RebuildJob, num_blocks: int) -> None:
    """The walk, from where the store says that it was left."""
    label, first = rebuild.STAGE, rebuild.num_complete(job, num_blocks)
    with run.timed(label, num_blocks - first):
        if first == num_blocks:
            return
        run.step(f"{label} · gradients", lambda: pool.get([pool.submit(0, rebuild.begin, job, first)]))
        for block in range(first, num_blocks):
            run.step(f"{label} · block {block}", partial(_block, pool, job, block))
            run.advance(label, f"block {block}")
        pool.get([pool.submit(0, rebuild.end)])


def _block(pool: Pool, job: RebuildJob, block: int) -> None:
    pool.get([pool.submit(0, rebuild.rebuild, job, block)])


def helps(scores: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the rebuilt blocks are kept: on images that nothing was calibrated on, they are better in the mean."""
    return bool(scores[REBUILT]["kl_nats"] < scores[AS_ROUNDED]["kl_nats"])


def reconstruction_json(outcomes: Sequence[BlockOutcome]) -> dict[str, Any]:
    """Counts of the outcomes, and every one of them."""
    return {
        "num_blocks": len(outcomes),
        "changed": sum(outcome.accepted for outcome in outcomes),
        "diverged": sum(outcome.diverged is not None for outcome in outcomes),
        "blocks": [{**asdict(outcome), "changed": outcome.accepted} for outcome in outcomes],
    }


def stream_of(stream: StreamJob, codes: CodesFrom) -> StreamJob:
    """The model that codes are of: candidates know theirs, and rebuilt blocks have grids learnt with their codes."""
    if isinstance(codes, CandidatesJob):
        return codes.profile.stream
    if stream.activations is None or codes.stage != rebuild.STAGE:
        return stream
    return replace(stream, activations=rebuilt_with(stream.activations, codes))
