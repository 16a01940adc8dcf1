"""Plans that do not look at costs: what a cost-based allocation has to beat.

They choose from the same problem, so fused groups, limits of the target and storage are those of the real
plans. Their bound is that of the best plan of the same storage: the gap says what uniform or ranked bits
give away at that size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from lrpq.allocate.knapsack import lower_bound
from lrpq.allocate.problem import Group, Method, Option, Plan, Problem, plan_of
from lrpq.errors import BudgetError, ConfigError, QuantizationError
from lrpq.model.layers import Choice


def uniform(problem: Problem, choice: Choice) -> Plan:
    """Return the plan that gives every group but fixed ones the same choice; the capacity is *not* looked at.

    Raises:
        ConfigError: a group does not have the choice (a keep rule, another group size).
    """
    return _plan(problem, [_option(group, choice) for group in problem.groups], Method.UNIFORM)


def nearest_uniform(problem: Problem, *, at_bits: float | None = None) -> Plan:
    """Return the uniform plan whose all-in bits are nearest; of equally near ones the widest choice.

    It may lie above the capacity: the nearest, not the nearest below, is the fair control.

    Args:
        problem: where the choices are.
        at_bits: all-in bits per weight to be near to; by default what the problem's capacity is.

    Raises:
        ConfigError: no choice is common to all groups.
    """
    free = [group for group in problem.groups if not group.fixed]
    common = set.intersection(*({option.choice for option in group.options} for group in free))
    choices = sorted(choice for choice in common if choice is not None)
    if not choices:
        raise ConfigError("no uniform plan: no choice is common to all groups; drop the keep rules")
    wanted = (
        Fraction(problem.capacity_bits) if at_bits is None else Fraction(repr(float(at_bits))) * problem.num_weights
    )

    def distance(choice: Choice) -> Fraction:
        return abs(sum(_option(group, choice).storage_bits for group in problem.groups) - wanted)

    return uniform(problem, min(reversed(choices), key=distance))


def widest_uniform(problem: Problem, *, code_bits: float = math.inf) -> Plan | None:
    """Return the uniform plan of most bits that is within the capacity; None if no common choice is.

    Of choices of equal size the one with the lower cost; none with codes of more than ``code_bits``.
    """
    free = [group for group in problem.groups if not group.fixed]
    common = set.intersection(*({option.choice for option in group.options} for group in free))
    plans = [uniform(problem, choice) for choice in sorted(c for c in common if c is not None and c.bits <= code_bits)]
    fitting = [plan for plan in plans if plan.storage_bits <= problem.capacity_bits]
    return max(fitting, key=lambda plan: (plan.storage_bits, -plan.cost_nats), default=None)


def two_level(problem: Problem, scores: Mapping[str, float], *, low: Choice, high: Choice) -> Plan:
    """Rank groups by importance and raise each from ``low`` to ``high``, in that order, if it still fits.

    The published rankings take the top k and stop; going on to later groups that fit gives the baseline its
    whole budget. Equal scores keep the order of groups.

    Args:
        problem: groups and capacity.
        scores: module name -> importance, higher is more important; a fused group's is its members' mean.
        low: choice of the unimportant groups.
        high: choice of the important ones.

    Raises:
        ConfigError: a group lacks a choice or a module has no score.
        QuantizationError: a score is not finite.
        BudgetError: ``low`` everywhere is above the capacity.
    """
    importance = [_mean_score(group, scores) for group in problem.groups]
    picks = [_option(group, low) for group in problem.groups]
    free = problem.capacity_bits - sum(pick.storage_bits for pick in picks)
    if free < 0:
        raise BudgetError(
            f"two levels {low} and {high}: {low} everywhere takes {-free} bits more than the capacity of "
            f"{problem.capacity_bits}; choose a narrower low level"
        )
    for index in sorted(range(len(picks)), key=lambda index: -importance[index]):
        raised = _option(problem.groups[index], high)
        extra = raised.storage_bits - picks[index].storage_bits
        if extra <= free:
            picks[index] = raised
            free -= extra
    return _plan(problem, picks, Method.TWO_LEVEL)


def _option(group: Group, choice: Choice) -> Option:
    """The group's option of this choice, or the only one of a fixed group."""
    for option in group.options:
        if option.choice == choice or group.fixed:
            return option
    have = ", ".join(str(option.choice or "16 bits") for option in group.options)
    raise ConfigError(f"{group.name} has no choice {choice}; it has {have}")


def _mean_score(group: Group, scores: Mapping[str, float]) -> float:
    if group.fixed:
        return 0.0
    missing = [member.name for member in group.members if member.name not in scores]
    if missing:
        raise ConfigError(f"{missing[0]}: no importance score")
    for member in group.members:
        if not math.isfinite(scores[member.name]):
            raise QuantizationError(f"{member.name}: importance score is {scores[member.name]}; expected finite")
    return math.fsum(scores[member.name] for member in group.members) / len(group.members)


def _plan(problem: Problem, picks: Sequence[Option], method: Method) -> Plan:
    storage = sum(pick.storage_bits for pick in picks)
    bound = lower_bound(problem, capacity_bits=storage)
    return plan_of(problem, picks, method=method, bound_nats=bound, bound_bits=storage)
