"""Multiple-choice knapsack: Lagrangian relaxation (the whole frontier at once) and the exact integer program.

    minimise  sum_g c_g(o_g)   over one option o_g per group g,   subject to  sum_g b_g(o_g) <= B

The dual function L(lambda) = sum_g min_o (c_g(o) + lambda b_g(o)) - lambda B bounds the optimum from below
for every lambda >= 0 (Everett 1963). Only options on the lower convex hull of a group's (bits, cost) points
can be minimisers, so walking all hulls' segments by falling slope passes every solution that some lambda
makes best; the segment that first does not fit gives the best lambda, and its bound is the linear
relaxation's (Sinha and Zoltners 1979).
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import highspy
import numpy as np

from lrpq.allocate.problem import Method, Option, Plan, Problem, plan_of
from lrpq.errors import QuantizationError

PLAN_GAP = 1e-4
"""To which a plan of weights is proved best: its costs are good to tens of percent, and the last digits cost a GPU's
host up to three seconds for 210 layers (docs/log.md)."""
_ATTEMPTS = 4  # of the integer program, each with a little less capacity, before the start is taken as it is


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """A hull segment: from one option of a group to the next larger one on its hull."""

    group: int
    to: Option
    bits: int
    slope: float
    """Nats saved per bit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Relaxation:
    picks: list[Option]
    """Feasible."""
    bound_nats: float
    multiplier: float
    """The best lambda, nats per bit."""


def solve_lagrangian(problem: Problem) -> Plan:
    """Return the plan of the best multiplier, its unused capacity filled greedily; gap is to the dual bound.

    Deterministic: equal slopes are taken in the order of groups. Never above the capacity.
    """
    relaxed = _relax(problem, problem.capacity_bits)
    return plan_of(problem, relaxed.picks, method=Method.LAGRANGIAN, bound_nats=relaxed.bound_nats)


def lower_bound(problem: Problem, *, capacity_bits: int) -> float:
    """Return nats that no plan within ``capacity_bits`` (at least the smallest possible) goes below."""
    return _relax(problem, capacity_bits).bound_nats


def frontier(problem: Problem) -> list[tuple[int, float]]:
    """Return (storage bits, cost in nats) of every plan that some multiplier makes best, smallest first.

    The capacity plays no part. The points are the corners of the lower convex hull of all plans; the last
    one gives every group its best option.
    """
    useful = [group.useful_options() for group in problem.groups]
    picks = [options[0] for options in useful]
    points = [_totals(picks)]
    for step in _steps(useful):
        picks[step.group] = step.to
        points.append(_totals(picks))
    return points


def solve_exact(problem: Problem, *, time_limit_s: float = 60.0, relative_gap: float = 1e-6) -> Plan:
    """The plan of ``exact_picks``; bound and gap are in it."""
    found = exact_picks(problem, time_limit_s=time_limit_s, relative_gap=relative_gap)
    return plan_of(
        problem,
        found.options,
        method=Method.EXACT,
        bound_nats=found.bound_nats,
        stopped_early=found.stopped_early,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Picks:
    """A solution: one option a group, in the order of the problem's groups."""

    options: list[Option]
    bound_nats: float
    """No solution costs less."""
    stopped_early: bool = False
    """The time limit ended the search."""


def exact_picks(problem: Problem, *, time_limit_s: float = 60.0, relative_gap: float = 1e-6) -> Picks:
    """Solve the integer program with HiGHS to within ``relative_gap``.

    The Lagrangian plan is the start and its multiplier removes options first: one whose reduced cost alone
    lifts the dual bound above the start's cost is in no better plan. Solutions are checked and totalled in
    Python's integers, so the capacity holds to the bit. Deterministic for one version of HiGHS (one thread,
    fixed seed) unless the time limit ends the search (``stopped_early``).

    Raises:
        QuantizationError: HiGHS fails.
    """
    start = _relax(problem, problem.capacity_bits)
    _, start_cost = _totals(start.picks)
    if start_cost - start.bound_nats <= relative_gap * start.bound_nats:
        return Picks(options=start.picks, bound_nats=start.bound_nats)
    core = _core(problem, start)
    picks, bound, timed_out = _search(
        core, start, problem.capacity_bits, time_limit_s=time_limit_s, relative_gap=relative_gap
    )
    _fill(picks, [group.useful_options() for group in problem.groups], problem.capacity_bits)
    if _totals(picks)[1] >= start_cost:
        picks = start.picks
    # plans outside the core cost more than the start: the core's bound or the start's cost bounds all
    lowest = max(start.bound_nats, min(bound, start_cost))
    return Picks(options=picks, bound_nats=lowest, stopped_early=timed_out)


def _totals(picks: Sequence[Option]) -> tuple[int, float]:
    return sum(pick.storage_bits for pick in picks), math.fsum(pick.cost_nats for pick in picks)


def _slope(start: Option, end: Option) -> float:
    return (start.cost_nats - end.cost_nats) / (end.storage_bits - start.storage_bits)


def _steps(useful: Sequence[Sequence[Option]]) -> list[_Step]:
    """Return all hull segments, steepest first; a group's own stay in order because its slopes fall."""
    steps = []
    for index, options in enumerate(useful):
        hull: list[Option] = []
        for option in options:
            while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], option):
                hull.pop()
            hull.append(option)
        for start, end in itertools.pairwise(hull):
            steps.append(
                _Step(group=index, to=end, bits=end.storage_bits - start.storage_bits, slope=_slope(start, end))
            )
    return sorted(steps, key=lambda step: (-step.slope, step.group))


def _relax(problem: Problem, capacity_bits: int) -> _Relaxation:
    useful = [group.useful_options() for group in problem.groups]
    picks = [options[0] for options in useful]
    free = capacity_bits - sum(pick.storage_bits for pick in picks)
    multiplier = 0.0  # every group reaches its best option
    for step in _steps(useful):
        if step.bits > free:
            multiplier = step.slope
            break
        picks[step.group] = step.to
        free -= step.bits
    lowest = math.fsum(options[-1].cost_nats for options in useful)
    bound = max(math.fsum([*(pick.cost_nats for pick in picks), -multiplier * free]), lowest)
    _fill(picks, useful, capacity_bits)
    return _Relaxation(picks=picks, bound_nats=bound, multiplier=multiplier)


def _fill(picks: list[Option], useful: Sequence[Sequence[Option]], capacity_bits: int) -> None:
    """Spend the free capacity in place: again and again on the fitting option that saves most per bit."""
    free = capacity_bits - sum(pick.storage_bits for pick in picks)
    while True:
        best: tuple[float, int, Option] | None = None
        for index, (pick, options) in enumerate(zip(picks, useful, strict=True)):
            for option in options:
                extra = option.storage_bits - pick.storage_bits
                if 0 < extra <= free and option.cost_nats < pick.cost_nats:
                    slope = _slope(pick, option)
                    if best is None or slope > best[0]:
                        best = (slope, index, option)
        if best is None:
            return
        free -= best[2].storage_bits - picks[best[1]].storage_bits
        picks[best[1]] = best[2]


def _core(problem: Problem, start: _Relaxation) -> list[list[Option]]:
    """Return each group's options that a plan better than the start may hold, and the start's own."""
    room = _totals(start.picks)[1] - start.bound_nats
    core = []
    for group, pick in zip(problem.groups, start.picks, strict=True):
        options = group.useful_options()
        reduced = [option.cost_nats + start.multiplier * option.storage_bits for option in options]
        # relative slack for rounding: an option too many costs time only
        limit = min(reduced) + room + 1e-9 * (abs(min(reduced)) + room)
        core.append([o for o, value in zip(options, reduced, strict=True) if value <= limit or o is pick])
    return core


def _search(
    core: Sequence[Sequence[Option]],
    start: _Relaxation,
    capacity_bits: int,
    *,
    time_limit_s: float,
    relative_gap: float,
) -> tuple[list[Option], float, bool]:
    """Return feasible picks, a lower bound over the core in nats, and whether time ran out.

    Columns are options beyond a group's smallest. Weights are divided by their greatest common divisor.
    What is scaled after that is scaled by powers of two, which round nothing: costs so that the start's is
    about 1000, weights to at most about 1000, where HiGHS's absolute tolerances mean something.
    """
    base = [options[0] for options in core]
    columns = [(index, option) for index, options in enumerate(core) for option in options[1:]]
    if not columns:
        return base, _totals(base)[1], False
    extra = [option.storage_bits - base[index].storage_bits for index, option in columns]
    unit = math.gcd(*extra)
    room = (capacity_bits - _totals(base)[0]) // unit
    weight_scale = 2.0 ** min(0, 10 - (max(extra) // unit).bit_length())
    cost_scale = 2.0 ** min(1000, 10 - math.frexp(_totals(start.picks)[1])[1])
    model = _Model(
        groups=[index for index, _ in columns],
        costs=[(option.cost_nats - base[index].cost_nats) * cost_scale for index, option in columns],
        weights=[bits // unit * weight_scale for bits in extra],
        constant=_totals(base)[1] * cost_scale,
        start=[float(start.picks[index] is option) for index, option in columns],
    )
    bound, timed_out = math.inf, False
    deadline = time.monotonic() + time_limit_s
    for _ in range(_ATTEMPTS):
        if room < 0:
            break
        taken, lowest, timed_out = model.solve(
            room * weight_scale,
            time_limit_s=max(deadline - time.monotonic(), 0.0),
            absolute_gap=relative_gap * start.bound_nats * cost_scale,
        )
        bound = min(bound, lowest / cost_scale)  # the first: less capacity only raises it
        picks = list(base)
        for column in taken:
            picks[columns[column][0]] = columns[column][1]
        over = _totals(picks)[0] - capacity_bits
        if over <= 0:
            return picks, bound, timed_out
        # within HiGHS's tolerance, not within the budget: ask for less; the first bound still holds
        room -= -(-over // unit)
    return start.picks, bound, timed_out


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    """min constant + costs x,  weights x <= capacity,  at most one x of a group is 1,  x binary."""

    groups: list[int]
    costs: list[float]
    weights: list[float]
    constant: float
    start: list[float]

    def solve(self, capacity: float, *, time_limit_s: float, absolute_gap: float) -> tuple[list[int], float, bool]:
        """Return the columns that are 1, the lower bound and whether time ran out."""
        size = len(self.costs)
        rows = {group: row for row, group in enumerate(dict.fromkeys(self.groups), start=1)}
        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = size, 1 + len(rows)
        lp.offset_ = self.constant
        lp.col_cost_ = np.array(self.costs)
        lp.col_lower_, lp.col_upper_ = np.zeros(size), np.ones(size)
        lp.row_lower_ = np.full(lp.num_row_, -highspy.kHighsInf)
        lp.row_upper_ = np.array([capacity] + [1.0] * len(rows))
        lp.integrality_ = [highspy.HighsVarType.kInteger] * size
        lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
        lp.a_matrix_.start_ = np.arange(0, 2 * size + 1, 2)
        lp.a_matrix_.index_ = np.array([(0, rows[group]) for group in self.groups]).ravel()
        lp.a_matrix_.value_ = np.array([(weight, 1.0) for weight in self.weights]).ravel()
        solver = highspy.Highs()
        for option, value in {
            "output_flag": False,
            "threads": 1,
            "random_seed": 0,
            "time_limit": time_limit_s,
            "mip_rel_gap": 0.0,
            "mip_abs_gap": absolute_gap,
            "mip_feasibility_tolerance": 1e-9,
            "primal_feasibility_tolerance": 1e-9,
            "dual_feasibility_tolerance": 1e-9,
        }.items():
            solver.setOptionValue(option, value)
        warm = highspy.HighsSolution()
        warm.col_value = self.start
        if highspy.HighsStatus.kError in (solver.passModel(lp), solver.setSolution(warm), solver.run()):
            raise QuantizationError(f"allocation: HiGHS failed on {size} options; use the lagrangian method")
        status = solver.getModelStatus()
        timed_out = status == highspy.HighsModelStatus.kTimeLimit
        if status != highspy.HighsModelStatus.kOptimal and not timed_out:
            text = solver.modelStatusToString(status)
            raise QuantizationError(f"allocation: HiGHS ended with {text!r}; use the lagrangian method")
        values = solver.getSolution().col_value
        taken = [column for column, value in enumerate(values) if value > 0.5]
        return taken, solver.getInfo().mip_dual_bound, timed_out
