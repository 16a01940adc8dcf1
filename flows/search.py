"""``--max-kl``: the smallest budget whose codes keep a limit on held-out calibration windows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flows import jobs
from flows.calibrate import HeldOut
from flows.guard import OURS, Contender
from flows.guard import STAGE as GUARD
from flows.jobs import JobContext
from flows.planning import Planner
from flows.scoring import ScoredWindows, score_stored
from flows.stages import run_refine
from flows.stitching import Stitching
from lrpq.allocate.accuracy import smallest_budget
from lrpq.allocate.plan import Plan
from lrpq.model.streaming import BlockStream
from tasks.candidates import CandidatesJob
from tasks.cluster import Pool

DIGITS = 4
"""Of budgets in bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """What a search measures with."""

    context: JobContext
    pool: Pool
    stream: BlockStream
    planner: Planner
    candidates: CandidatesJob
    stitching: Stitching
    head: CandidatesJob | None
    held_out: HeldOut

    def run(self, rows: list[dict[str, Any]], *, max_kl: float) -> dict[str, Any]:
        """Set the planner's budget; returns what was found and tried, for the manifest.

        Candidates are measured many budgets at once; with sequential refinement, the budgets that they point to are
        refined and measured again, and those measurements count. Everything measured is in the store.

        Raises:
            BudgetError: no budget keeps the limit.
        """
        costs = self.planner.cost_rows(rows)
        problem = self.planner.pose(costs).problem
        sizes = [[option.storage_bits for option in group.options] for group in problem.groups]
        lowest, highest = (_rounded_up(sum(map(end, sizes)) / problem.num_weights) for end in (min, max))

        def solved(bits: float) -> Plan:
            self.planner.set_budget(_rounded_up(bits))
            return self.planner.solved(costs)

        def quick(budgets: Sequence[float]) -> list[float]:
            label = f"search from {budgets[0]:.2f} to {budgets[-1]:.2f} bits"
            names = [f"{_rounded_up(bits):.{DIGITS}f}" for bits in budgets]  # budgets too close to tell apart are one
            plans = {name: solved(float(name)) for name in names}
            contenders = {
                name: self.stitching.made(plan, label=f"stitch at {name} bits") for name, plan in plans.items()
            }
            found = dict(zip(contenders, self._measured(contenders, label), strict=True))
            return [found[name] for name in names]

        def real(bits: float) -> float:
            plan = solved(bits)
            job = jobs.refine_job(self.context, self.candidates.profile, plan)
            run_refine(self.context.run, self.pool, job, self.stream, label=f"refine at {bits:.{DIGITS}f} bits")
            kept = {OURS: Contender(codes=job.folder, plan=plan)}
            return self._measured(kept, f"measure at {bits:.{DIGITS}f} bits")[0]

        if self.context.config.run.candidates.cost_rows is not None:
            self.context.run.warn("costs are those of some rows: each plan that --max-kl measures is quantized first")
        sequential = self.context.config.plan.refine == "sequential"
        found = smallest_budget(quick, real if sequential else None, lowest=lowest, highest=highest, max_kl=max_kl)
        self.planner.set_budget(_rounded_up(found.bits))
        return {"max_kl": max_kl, **asdict(found)}

    def _measured(self, contenders: Mapping[str, Contender], label: str) -> list[float]:
        stream = self.candidates.profile.stream
        found = score_stored(
            self.context.run,
            self.pool,
            stream,
            ScoredWindows(stored=self.held_out, length=stream.length),
            contenders,
            head=self.head,
            stage=GUARD,
            label=label,
        )
        return [float(found[name]["kl_nats"]) for name in contenders]


def _rounded_up(bits: float) -> float:
    scale = float(10**DIGITS)
    return math.ceil(round(bits * scale, 3)) / scale
