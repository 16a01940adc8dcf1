"""Allocate: from the stored costs to a choice for every module under the budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from lrpq.allocate.baselines import nearest_uniform, widest_uniform
from lrpq.allocate.budget import UNQUANTIZED_BITS, Budget, BudgetBits, BudgetBytes
from lrpq.allocate.keep import KeepRule, parse_keep
from lrpq.allocate.knapsack import PLAN_GAP, solve_exact, solve_lagrangian
from lrpq.allocate.plan import Plan
from lrpq.allocate.problem import CostRow, Problem, build_problem
from lrpq.allocate.targets import Target
from lrpq.checkpoint.assemble import expert_scope
from lrpq.checkpoint.formats import CheckpointFormat
from lrpq.checkpoint.formats import storage_bits as format_bits
from lrpq.checkpoint.modules import ExpertScope
from lrpq.checkpoint.plan import planned_size
from lrpq.errors import ConfigError
from lrpq.model.layers import HEAD, Choice, LinearSpec
from lrpq.model.safetensors_source import ModelSource
from lrpq.notation import BITS_PER_BYTE
from lrpq.quant.packing import storage_bits

SOLVERS: Mapping[str, Callable[[Problem], Plan]] = {
    "exact": partial(solve_exact, relative_gap=PLAN_GAP),
    "lagrangian": solve_lagrangian,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Posed:
    """What a plan's configuration asks for."""

    problem: Problem
    unlimited: Problem
    """Without limit and without rules for single modules, except those that leave them at 16 bits."""
    notes: tuple[str, ...]
    """What a user may not expect of the rules."""


def cost_rows(rows: Iterable[Mapping[str, Any]], specs: Sequence[LinearSpec]) -> list[CostRow]:
    """Stored cost rows as the allocation wants them."""
    by_name = {spec.name: spec for spec in specs}
    return [
        CostRow(
            module=by_name[row["name"]],
            choice=Choice(bits=row["bits"], group_size=row["group_size"], scale_bits=row["scale_bits"]),
            storage_bits=row["storage_bits"],
            cost_nats=row["cost_nats"],
        )
        for row in rows
    ]


def rows_without_costs(specs: Sequence[LinearSpec], choices: Sequence[Choice]) -> list[CostRow]:
    """Rows of all candidates before there are any: their storage, and no cost.

    Posing a problem from them finds what is wrong with a plan before anything is computed.

    Raises:
        ConfigError: no group size divides the width of a module; it is named.
    """
    for spec in specs:
        if not any(choice.fits(spec.d_in) for choice in choices):
            asked = ", ".join(str(size) for size in sorted({choice.group_size for choice in choices}))
            raise ConfigError(
                f"{spec.name}: no group size asked for ({asked}) divides its {spec.d_in} inputs; add one that "
                "does to --group-size, or channel (one scale a row)"
            )
    return [
        CostRow(
            module=spec,
            choice=choice,
            storage_bits=storage_bits(spec.d_out, spec.d_in, choice),
            cost_nats=0.0,
        )
        for spec in specs
        for choice in choices
        if choice.fits(spec.d_in)
    ]


def rows_in_format(rows: Sequence[CostRow], format: CheckpointFormat) -> list[CostRow]:
    """The choices that a format can store, with what they take in it. Dense weights count as if they were packed.

    Raises:
        ConfigError: the format can store no choice of a module; it is named.
    """
    if format is not CheckpointFormat.GPTQ:
        return list(rows)
    found: list[CostRow] = []
    refusals: dict[str, ConfigError] = {}
    for row in rows:
        try:
            bits = row.storage_bits if row.choice is None else format_bits(row.module, row.choice, format)
        except ConfigError as error:
            refusals.setdefault(row.module.name, error)
        else:
            found.append(replace(row, storage_bits=bits))
    stored = {row.module.name for row in found}
    for name, refusal in refusals.items():
        if name not in stored:
            raise refusal
    return found


def pose(
    rows: Sequence[CostRow],
    source: ModelSource,
    *,
    budget_bits: float | None,
    budget_bytes: int | None,
    keep: Sequence[str],
    target: str,
    tensor_parallel: int,
    format: str,
) -> Posed:
    """The allocation problem of a plan's configuration. The head, where it has rows, is fixed at its one choice.

    Raises:
        ConfigError: a keep rule matches nothing or contradicts another, or nothing is left to quantize.
        BudgetError: the budget is impossible; the smallest possible one is named.
    """
    rules = [parse_keep(rule) for rule in keep]
    head = {row.module.name for row in rows if row.module.input_site == HEAD}
    written_as = CheckpointFormat(format)
    rows = rows_in_format(rows, written_as)
    posed = partial(
        build_problem,
        rows,
        target=Target(target),
        tensor_parallel=tensor_parallel,
        fixed=head,
        fused=Target(target) is Target.VLLM or written_as is CheckpointFormat.GPTQ,
        model_wide_experts=expert_scope(written_as, Target(target)) is ExpertScope.MODEL,
    )
    # Which modules stay at 16 bits decides what a budget in bytes has to pay for besides.
    unlimited = posed(
        budget=BudgetBits(bits=UNQUANTIZED_BITS),
        keep=[rule for rule in rules if rule.bits == UNQUANTIZED_BITS],
    )
    dense = [item.module.name for item in unlimited.left if item.module.routed]
    if dense and expert_scope(written_as, Target(target)) is ExpertScope.MODEL:
        raise ConfigError(
            f"{dense[0]}: left at 16 bits, but transformers loads no dense experts from a checkpoint with packed "
            "layers; quantize the experts too, or use --target vllm or --format dense"
        )
    budget: Budget
    if budget_bits is not None:
        budget = BudgetBits(bits=budget_bits)
    elif budget_bytes is not None:
        fixed_bytes = _fixed_bytes(rows, unlimited, source, written_as)
        budget = BudgetBytes(total_bytes=budget_bytes, fixed_bytes=fixed_bytes)
    else:
        raise ConfigError("no budget: give --budget BITS or --budget-bytes SIZE")
    problem = posed(budget=budget, keep=rules)
    return Posed(problem=problem, unlimited=unlimited, notes=tuple(_bound_besides(rules, problem)))


def _bound_besides(rules: Sequence[KeepRule], problem: Problem) -> Iterator[str]:
    """Say of each rule which modules it binds only because they share a choice with those it names."""
    for rule in rules:
        others: list[str] = []
        for group in problem.groups:
            named = [fnmatchcase(member.name, rule.pattern) for member in group.members]
            if any(named):
                others += [m.name for m, matched in zip(group.members, named, strict=True) if not matched]
        if others:
            yield f"--keep {rule} also binds {len(others)} modules that share a choice with them, such as {others[0]}"


def solve(problem: Problem, *, solver: str) -> Plan:
    """Solve with the named solver."""
    return SOLVERS[solver](problem)


def within_bytes(
    plan: Plan, problem: Problem, source: ModelSource, *, total_bytes: int, solver: str, format: str
) -> Plan:
    """The plan, or one with less capacity where its weight files would be larger than ``total_bytes``.

    The capacity was found with the headers of one layout; another number of files can make them a few bytes longer.

    Raises:
        BudgetError: no plan fits.
    """
    while True:
        chosen = {name: choice for name, choice in plan.choices.items() if choice is not None}
        size = planned_size(source, chosen, specs=problem.modules, format=CheckpointFormat(format))
        excess = size.total_bytes - total_bytes
        if excess <= 0:
            return plan
        problem = replace(problem, capacity_bits=min(problem.capacity_bits, plan.storage_bits) - excess * BITS_PER_BYTE)
        plan = solve(problem, solver=solver)


def uniform_within(problem: Problem, source: ModelSource, *, total_bytes: int | None, format: str) -> Plan | None:
    """The widest uniform plan under the same budget; None where there is none (a keep rule, a target's limits)."""
    while (plan := widest_uniform(problem)) is not None:
        chosen = {name: choice for name, choice in plan.choices.items() if choice is not None}
        size = planned_size(source, chosen, specs=problem.modules, format=CheckpointFormat(format))
        if total_bytes is None or size.total_bytes <= total_bytes:
            return plan
        if plan.storage_bits <= problem.minimum_bits:
            return None
        problem = replace(problem, capacity_bits=plan.storage_bits - 1)
    return None


def control(unlimited: Problem, *, at_bits: float) -> Plan:
    """Uniform widths nearest to the bits that were reached, whatever single modules were asked to keep."""
    return nearest_uniform(unlimited, at_bits=at_bits)


def _fixed_bytes(rows: Sequence[CostRow], unlimited: Problem, source: ModelSource, format: CheckpointFormat) -> int:
    """Bytes of the checkpoint besides codes, scales and what the problem counts for modules left at 16 bits.

    From the layout with every module at its widest choice, whose headers are longest. Modules that are left are copied
    as they are stored, which in a float32 model takes 32 bits a weight; the problem counts 16 of them.
    """
    left = {item.module.name for item in unlimited.left}
    widest: dict[str, Choice] = {}
    for row in sorted(rows, key=lambda row: row.storage_bits):
        if row.choice is not None and row.module.name not in left:
            widest[row.module.name] = row.choice
    size = planned_size(source, widest, specs=unlimited.modules, format=format)
    return size.fixed_bytes - unlimited.sizes.left_bits // BITS_PER_BYTE
