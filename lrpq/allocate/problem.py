"""The allocation problem: one option per fused group, least total cost, total storage within a hard capacity.

Serving kernels fuse q, k and v (gate and up) into one layer with one scheme, so the members of a fused
group share a choice: the group's options are the choices that every member has, its costs and bits are sums
over the members.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from lrpq.allocate.budget import UNQUANTIZED_BITS, Budget, Sizes, smallest_bits
from lrpq.allocate.keep import KeepRule, match_keep
from lrpq.allocate.options import CostRow, Group, Option, index_rows, shared_options
from lrpq.allocate.plan import Method, Plan
from lrpq.allocate.targets import Target, check_tensor_parallel, refusal
from lrpq.errors import BudgetError, ConfigError
from lrpq.model.layers import Choice, LinearSpec

MODEL_WIDE_EXPERTS = "experts"
"""Name of the group of all experts of a model."""
__all__ = [
    "CostRow",
    "Group",
    "LeftAt16",
    "Method",
    "Option",
    "Plan",
    "Problem",
    "build_problem",
    "plan_of",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftAt16:
    """A module outside the allocation, and why."""

    module: LinearSpec
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Groups, the capacity they share, and what was left out. A problem that exists has a solution.

    Raises:
        ConfigError: there is no group, a group without options, or a name twice.
        BudgetError: the capacity is below the smallest possible storage, which is named.
    """

    groups: tuple[Group, ...]
    capacity_bits: int
    left: tuple[LeftAt16, ...] = ()

    def __post_init__(self) -> None:
        if not self.groups:
            raise ConfigError("nothing to allocate: no module may be quantized")
        names = {group.name for group in self.groups}
        if len(names) != len(self.groups) or not all(group.options for group in self.groups):
            raise ConfigError("allocation: group names must differ and every group needs an option")
        if self.capacity_bits < self.minimum_bits:
            raise BudgetError(
                f"capacity of {self.capacity_bits} bits in all is impossible with these choices; "
                f"the smallest possible is {self.minimum_bits} in all ({smallest_bits(self.sizes)} a weight)"
            )

    @property
    def minimum_bits(self) -> int:
        """Storage when every group takes its smallest option."""
        return _minimum_bits(self.groups)

    @property
    def num_weights(self) -> int:
        """Weights in the allocation: the denominator of average bits, whatever the plan."""
        return sum(group.num_weights for group in self.groups)

    @property
    def modules(self) -> tuple[LinearSpec, ...]:
        """All modules, in the allocation or left out."""
        return (*(m for group in self.groups for m in group.members), *(item.module for item in self.left))

    @property
    def sizes(self) -> Sizes:
        """What turns a budget into a capacity."""
        return _sizes(self.groups, self.left)

    def with_choices(self, choices: Mapping[str, Choice]) -> Problem:
        """Return the same problem with one option a group: that of its first member's choice.

        Raises:
            ConfigError: a group has no such option.
        """
        groups = tuple(
            replace(group, options=tuple(o for o in group.options if o.choice == choices[group.members[0].name]))
            for group in self.groups
        )
        return Problem(groups=groups, capacity_bits=self.capacity_bits, left=self.left)

    def with_budget(self, budget: Budget) -> Problem:
        """Return the same problem under another budget.

        Raises:
            BudgetError: the budget is outside what the choices allow.
        """
        return Problem(groups=self.groups, capacity_bits=budget.capacity_bits(self.sizes), left=self.left)


def plan_of(
    problem: Problem,
    picks: Sequence[Option],
    *,
    method: Method,
    bound_nats: float,
    bound_bits: int | None = None,
    stopped_early: bool = False,
) -> Plan:
    """Make the plan of one option per group, in the order of ``problem.groups``."""
    cost_nats = math.fsum(option.cost_nats for option in picks)
    chosen: list[tuple[LinearSpec, Choice | None]] = [(left.module, None) for left in problem.left]
    for group, option in zip(problem.groups, picks, strict=True):
        chosen += [(member, option.choice) for member in group.members]
    chosen.sort(key=lambda pair: (pair[0].block, pair[0].name))
    useful = [group.useful_options() for group in problem.groups]
    return Plan(
        method=method,
        choices={module.name: choice for module, choice in chosen},
        storage_bits=sum(option.storage_bits for option in picks),
        num_weights=problem.num_weights,
        capacity_bits=problem.capacity_bits,
        cost_nats=cost_nats,
        bound_nats=min(bound_nats, cost_nats),
        bound_bits=problem.capacity_bits if bound_bits is None else bound_bits,
        binding=any(pick.cost_nats > options[-1].cost_nats for pick, options in zip(picks, useful, strict=True)),
        num_dominated=sum(
            len(group.options) - len(options) for group, options in zip(problem.groups, useful, strict=True)
        ),
        left_at_16={left.module.name: left.reason for left in problem.left},
        left_bits=problem.sizes.left_bits,
        stopped_early=stopped_early,
    )


def build_problem(
    rows: Iterable[CostRow],
    *,
    budget: Budget,
    keep: Sequence[KeepRule] = (),
    target: Target = Target.TRANSFORMERS,
    tensor_parallel: int = 1,
    fixed: Collection[str] = (),
    fused: bool = True,
    model_wide_experts: bool = False,
) -> Problem:
    """Sum rows over fused groups, apply keep rules and the target's limits, turn the budget into a capacity.

    Not ``fused``, every module but an expert is a group of its own: for a loader that runs layers one by one.

    A keep rule or a limit on one member of a fused group holds for the whole group. What the target cannot
    run in any choice is left at 16 bits, also where a keep rule asks for another width. Modules in ``fixed`` have one
    choice, which counts, and keep rules do not see them. With ``model_wide_experts`` all experts of the model share one
    choice, for a loader that runs them under one scheme. The order of rows changes nothing.

    Raises:
        QuantizationError: a cost is negative or not finite, storage is not positive, a row comes twice, or
            members of a fused group have no choice in common; the module is named.
        ConfigError: a keep rule matches nothing, contradicts another or asks for a width without
            candidates; or nothing is left to quantize.
        BudgetError: the budget is below the smallest possible, which is named, or above 16 bits.
    """
    check_tensor_parallel(target, tensor_parallel)
    modules, table = index_rows(rows)
    kept = match_keep(keep, [name for name in modules if name not in fixed])
    together: dict[str, list[LinearSpec]] = {}
    for module in modules.values():
        name = module.fused_group if fused or module.routed else module.name
        name = MODEL_WIDE_EXPERTS if module.routed and model_wide_experts else name
        together.setdefault(name, []).append(module)
    groups: list[Group] = []
    left: list[LeftAt16] = []
    for name, listed in sorted(together.items(), key=lambda item: (min(member.block for member in item[1]), item[0])):
        members = tuple(sorted(listed, key=lambda member: (member.block, member.name)))
        options = shared_options(members, table)
        rule = _rule_of_group(members, kept)
        reason = (
            f"keep rule '{rule}'"
            if rule is not None and rule.bits == UNQUANTIZED_BITS
            else _refused_by_target(members, options, target=target, tensor_parallel=tensor_parallel)
        )
        if reason is not None:
            left += [LeftAt16(module=member, reason=reason) for member in members]
            continue
        options = [
            option
            for option in options
            if option.choice is None or not _refusals(members, option.choice, target, tensor_parallel)
        ]
        if rule is not None:
            options = _kept_options(options, rule=rule, members=members)
        given = all(member.name in fixed for member in members)
        groups.append(Group(name=name, members=members, options=tuple(options), fixed=given))
    if all(group.fixed for group in groups):
        why = f"{left[0].module.name}: {left[0].reason}" if left else "no costs were given"
        raise ConfigError(f"nothing to allocate: no module may be quantized ({why})")
    sizes = _sizes(groups, left)
    return Problem(groups=tuple(groups), capacity_bits=budget.capacity_bits(sizes), left=tuple(left))


def _sizes(groups: Sequence[Group], left: Sequence[LeftAt16]) -> Sizes:
    return Sizes(
        minimum_bits=_minimum_bits(groups),
        num_weights=sum(group.num_weights for group in groups),
        left_bits=UNQUANTIZED_BITS * sum(item.module.num_weights for item in left),
    )


def _minimum_bits(groups: Sequence[Group]) -> int:
    return sum(min(option.storage_bits for option in group.options) for group in groups)


def _rule_of_group(members: Sequence[LinearSpec], kept: Mapping[str, KeepRule]) -> KeepRule | None:
    found: tuple[LinearSpec, KeepRule] | None = None
    for member in members:
        rule = kept.get(member.name)
        if rule is None:
            continue
        if found is not None and found[1].bits != rule.bits:
            raise ConfigError(
                f"keep rules '{found[1]}' and '{rule}' ask {found[0].name} and {member.name} for different "
                f"bits, but they are served as one layer; ask both for the same"
            )
        found = found or (member, rule)
    return found[1] if found else None


def _refusals(members: Sequence[LinearSpec], choice: Choice, target: Target, tensor_parallel: int) -> list[str]:
    found = []
    for member in members:
        why = refusal(member, choice, target=target, tensor_parallel=tensor_parallel)
        if why is not None:
            found.append(f"{target.value}: {member.name}: {why}")
    return found


def _refused_by_target(
    members: Sequence[LinearSpec], options: Sequence[Option], *, target: Target, tensor_parallel: int
) -> str | None:
    """Return why the target runs no choice of the group, or None if it runs one."""
    first: str | None = None
    for option in options:
        if option.choice is None:
            continue
        found = _refusals(members, option.choice, target, tensor_parallel)
        if not found:
            return None
        first = first or found[0]
    return first


def _kept_options(options: Sequence[Option], *, rule: KeepRule, members: Sequence[LinearSpec]) -> list[Option]:
    chosen = [option for option in options if option.choice is not None and option.choice.bits == rule.bits]
    if not chosen:
        bits = sorted({option.choice.bits for option in options if option.choice is not None})
        raise ConfigError(
            f"keep rule '{rule}': {members[0].name} has no {rule.bits}-bit candidate; "
            f"available: {', '.join(map(str, bits))} or {UNQUANTIZED_BITS}"
        )
    return chosen
