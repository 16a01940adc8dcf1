"""Codes of a plan on the original inputs: stored candidates, or made when a plan wants them."""

from __future__ import annotations

from dataclasses import dataclass

from flows import jobs
from flows.guard import Contender
from flows.jobs import JobContext
from flows.stages import run_stitch
from lrpq.allocate.plan import Plan
from lrpq.model.streaming import BlockStream
from tasks.candidates import CandidatesJob
from tasks.cluster import Pool


@dataclass(frozen=True, slots=True, kw_only=True)
class Stitching:
    """What codes are made with."""

    context: JobContext
    pool: Pool
    stream: BlockStream
    candidates: CandidatesJob

    def named(self, plan: Plan) -> Contender:
        """Say where the plan's codes are, or will be."""
        if self.candidates.cost_rows is None:
            return Contender(codes=self.candidates, plan=plan)
        return Contender(codes=jobs.stitch_job(self.context, self.candidates, plan).folder, plan=plan)

    def made(self, plan: Plan, *, label: str) -> Contender:
        """Make the plan's codes, unless they are stored."""
        if self.candidates.cost_rows is not None:
            job = jobs.stitch_job(self.context, self.candidates, plan)
            run_stitch(self.context.run, self.pool, job, self.stream, label=label)
        return self.named(plan)
