"""From costs to plans under what the user asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flows.config import CompressConfig, PlanConfig
from flows.result import choices_json
from flows.run import Run
from lrpq.allocate.budget import UNQUANTIZED_BITS, bits_for
from lrpq.allocate.plan import Plan
from lrpq.allocate.problem import CostRow
from lrpq.allocate.trellis import with_trellis_codes
from lrpq.allocate.wide import with_wide_scales
from lrpq.model.layers import Choice, LinearSpec
from lrpq.model.safetensors_source import ModelSource
from tasks import allocate

STAGE = "allocate"
REFINEMENT = {"refine", "share", "reconstruct", "correction", "correction_damping", "polish", "row_blocks"}
"""Fields of the plan that the allocation does not depend on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plans:
    """What the allocation decides."""

    ours: Plan
    uniform: Plan | None
    """The widest uniform one under the same budget, of candidates: what the result must not be worse than."""
    control: Plan | None
    """The uniform one nearest in size to what is reached, which is measured beside the result: plain GPTQ, scales in
    bfloat16."""


class Planner:
    """Plans of one compression.

    Args:
        config: what is asked for.
        source: the model.
        specs: its layers, with the head where that is quantized.
    """

    def __init__(self, config: CompressConfig, source: ModelSource, specs: Sequence[LinearSpec]) -> None:
        self.config, self.source, self.specs = config, source, specs
        self.wanted: PlanConfig = config.plan
        """With a budget: where an accuracy is asked for, the widest one until one is found."""
        if config.plan.max_kl is not None:
            self.set_budget(UNQUANTIZED_BITS)
        self.given: Mapping[str, Choice] | None = None
        """Choices that are decided already."""

    def set_budget(self, bits: float) -> None:
        """Take a budget in bits in place of the limit on the KL divergence."""
        self.wanted = self.config.plan.model_copy(update={"max_kl": None, "budget_bits": float(bits)})

    def give(self, choices: Mapping[str, Choice], rows: Sequence[CostRow]) -> None:
        """Take choices of all modules in the allocation, found elsewhere; the budget is what they take."""
        taken = [row for row in rows if choices.get(row.module.name) == row.choice]
        num_weights = sum(row.module.num_weights for row in taken)
        bits = bits_for(sum(row.storage_bits for row in taken), num_weights=num_weights)
        self.wanted = self.wanted.model_copy(update={"budget_bits": bits})
        self.given = choices

    def pose(self, rows: list[CostRow], *, budget_bits: float | None = None) -> allocate.Posed:
        """The allocation problem, under the budget that was asked for or another one.

        Raises:
            ConfigError: see ``tasks.allocate.pose``.
            BudgetError: the budget is impossible.
        """
        wanted = self.wanted
        return allocate.pose(
            rows,
            self.source,
            budget_bits=wanted.budget_bits if budget_bits is None else budget_bits,
            budget_bytes=wanted.budget_bytes,
            keep=wanted.keep,
            target=wanted.target,
            tensor_parallel=wanted.tensor_parallel,
            format=wanted.format,
        )

    def cost_rows(self, rows: list[dict[str, Any]]) -> list[CostRow]:
        """Stored costs as the allocation takes them."""
        return self.offered(allocate.cost_rows(rows, self.specs))

    def offered(self, candidates: list[CostRow]) -> list[CostRow]:
        """Rows of candidates with the kind of codes that is asked for."""
        return candidates if self.wanted.codes == "uniform" else with_trellis_codes(candidates)

    def solved(self, rows: list[CostRow]) -> Plan:
        """The plan under the budget, nothing else."""
        return allocate.solve(self.pose(rows).problem, solver=self.wanted.solver)

    def plans(self, run: Run, rows: list[dict[str, Any]], *, candidates_key: str) -> Plans:
        """The plan under the budget and the uniform ones beside it; a stage of the run."""
        wanted = self.wanted
        parameters = json.loads(wanted.model_dump_json(exclude=REFINEMENT))
        if self.given is not None:
            parameters["given"] = choices_json(self.given)
        folder = run.folder(
            STAGE,
            inputs={"candidates": candidates_key},
            parameters=parameters,
            code=["tasks.allocate", "lrpq.allocate.trellis"],
        )
        with run.timed(STAGE, 1, "plan"):
            candidates = allocate.cost_rows(rows, self.specs)
            posed = self.pose(self.offered(candidates))
            problem = posed.problem if self.given is None else posed.problem.with_choices(self.given)
            plan = run.step(STAGE, lambda: allocate.solve(problem, solver=wanted.solver))
            if wanted.budget_bytes is not None:
                plan = allocate.within_bytes(
                    plan,
                    posed.problem,
                    self.source,
                    total_bytes=wanted.budget_bytes,
                    solver=wanted.solver,
                    format=wanted.format,
                )
            same = posed.problem if wanted.codes == "uniform" else self.pose(candidates).problem
            uniform = allocate.uniform_within(same, self.source, total_bytes=wanted.budget_bytes, format=wanted.format)
            control = None
            if self.config.evaluation.enabled and self.config.evaluation.control:
                wide = self.pose(with_wide_scales(candidates), budget_bits=UNQUANTIZED_BITS)
                control = allocate.control(wide.unlimited, at_bits=self._control_bits(plan))
            run.progress.advance(STAGE)
        for note in posed.notes:
            run.warn(note)
        if not run.store.exists(folder.manifest):
            run.finish(folder, STAGE, {"choices": choices_json(plan.choices), "cost_nats": plan.cost_nats})
        if plan.stopped_early:
            run.warn(f"the allocation met its time limit: its cost may be {plan.gap:.2%} above the best possible")
        if not plan.binding and self.given is None:
            run.warn("the budget is larger than every module at its best choice needs; it is not used up")
        return Plans(ours=plan, uniform=uniform, control=control)

    def _control_bits(self, plan: Plan) -> float:
        """What the control's size is nearest to: what is reached, or where others had a share of it the budget."""
        asked = self.config.plan.budget_bits
        return plan.average_bits if self.given is None or asked is None else asked
