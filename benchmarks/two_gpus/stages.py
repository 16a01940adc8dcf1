"""The stages of a compression, as `lrpq compress` runs them, on a pool and a store of their own; no Prefect."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.two_gpus import ledger
from benchmarks.two_gpus.ledger import Ledger
from flows import jobs
from flows.calibrate import StoredWindows
from flows.config import CompressConfig
from flows.jobs import JobContext
from flows.planning import Planner
from flows.progress import PlainProgress
from flows.run import Run
from flows.sections import BIT_WIDTHS, SCALE_BITS
from flows.stages import run_candidates, run_profile, run_refine
from lrpq.model.source import open_source
from lrpq.model.streaming import BlockStream
from tasks.artifacts import StageFolder
from tasks.calibration.stored import write_windows
from tasks.calibration.windows import tokens_digest
from tasks.cluster import Pool
from tasks.model_identity import model_fingerprint
from tasks.resources import shards_of, windows_at_once
from tasks.store.objects import ObjectStore
from tasks.store.opened import open_store
from tasks.streams import DTYPES

STAGES = ("profile", "candidates", "refine")
DTYPE = "bfloat16"


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is compressed."""

    name: str
    model: Path
    tokens: Tensor
    """[windows, length]"""
    device: str
    budget_bits: float
    shards: int | None = None
    """As in the configuration."""
    group_sizes: tuple[int, ...] = (64, -1)
    """Of the candidates; lrpq's own."""
    bits: tuple[int, ...] = BIT_WIDTHS
    """Of the candidates."""
    stages: tuple[str, ...] = STAGES
    """The first ones of all."""

    @property
    def micro_batch(self) -> int:
        """Windows at once."""
        hidden = open_source(self.model).config.get_text_config().hidden_size
        return windows_at_once(None, device=self.device, length=self.tokens.shape[1], hidden=hidden)

    @property
    def num_shards(self) -> int:
        """Parts of the windows."""
        num_windows, length = self.tokens.shape
        return shards_of(
            self.shards, device=self.device, num_windows=num_windows, length=length, micro_batch=self.micro_batch
        )


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of one run."""

    seconds: float
    ended: float
    """Time of day."""
    workers: list[Ledger]


@dataclass(frozen=True, kw_only=True)
class Done:
    """One run: its stages, and where what they made lies."""

    store: ObjectStore
    stages: dict[str, Stage]
    folders: dict[str, StageFolder]
    losses: list[str]
    """Workers that were lost on the way; their time is in the stages."""


def run_stages(case: Case, pool: Pool, folder: Path, note: Callable[[str, Stage], None] | None = None) -> Done:
    """Profile, candidates, plan and refinement on an empty store in ``folder``; ``note`` is told of each stage."""
    config = CompressConfig.model_validate(
        {
            "run": {
                "model": str(case.model),
                "calibration": {"held_out": 0},
                "shards": case.shards,
                "candidates": {"group_sizes": case.group_sizes, "bits": case.bits, "scales": "bfloat16"},
            },
            "plan": {"budget_bits": case.budget_bits},
            "evaluation": {"enabled": False},
            "output": folder / "output",
            "store": str(folder / "store"),
        }
    )
    store = open_store(config.store)
    source = open_source(case.model)
    stream = BlockStream(source, dtype=DTYPES[DTYPE])
    progress = PlainProgress(sys.stderr)
    run = Run(store=store, run_id="two", progress=progress, device=case.device, threads=1, step=_plain)
    context = JobContext(
        run=run,
        config=config,
        model=case.model,
        fingerprint=model_fingerprint(case.model),
        dtype=DTYPE,
        micro_batch=case.micro_batch,
        length=case.tokens.shape[1],
        scale_bits=SCALE_BITS["bfloat16"],
    )
    digest = tokens_digest(case.tokens)
    windows = StoredWindows(
        key=f"two/windows-{digest[:24]}.parquet", digest=digest, num_windows=len(case.tokens), source=case.name
    )
    write_windows(store, windows.key, case.tokens)
    profile = jobs.profile_job(context, jobs.stream_job(context, windows), windows, specs=stream.specs)
    candidates = jobs.candidates_job(context, profile, specs=stream.specs, head=None)
    stages: dict[str, Stage] = {}

    def measured(name: str, action: Callable[[], Any]) -> Any:
        pool.each(ledger.start)
        began = time.perf_counter()
        found = action()
        seconds = time.perf_counter() - began
        stages[name] = Stage(seconds=seconds, ended=time.time(), workers=pool.each(ledger.finish))
        if note is not None:
            note(name, stages[name])
        return found

    measured("profile", lambda: run_profile(run, pool, profile, stream))
    folders = {"profile": profile.folder}
    if "candidates" not in case.stages:
        return Done(store=store, stages=stages, folders=folders, losses=list(pool.losses))
    folders["candidates"] = candidates.folder
    rows = measured("candidates", lambda: run_candidates(run, pool, candidates, stream))
    if "refine" not in case.stages:
        return Done(store=store, stages=stages, folders=folders, losses=list(pool.losses))
    plan = Planner(config, source, stream.specs).plans(run, rows, candidates_key=candidates.folder.key).ours
    refine = jobs.refine_job(context, profile, plan)
    measured("refine", lambda: run_refine(run, pool, refine, stream, label="refine"))
    folders["refine"] = refine.folder
    return Done(store=store, stages=stages, folders=folders, losses=list(pool.losses))


def _plain(name: str, action: Callable[[], Any]) -> Any:
    return action()


def as_json(stage: Stage) -> dict[str, Any]:
    """Seconds and ledgers."""
    return {"seconds": stage.seconds, "ended": stage.ended, "workers": [asdict(worker) for worker in stage.workers]}
