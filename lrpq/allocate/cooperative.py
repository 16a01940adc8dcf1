"""CoopQ's allocation: two choices a block, costs of blocks and of pairs of blocks, one integer program.

    minimise  phi . x + 1/2 x^T K x    subject to  sum_i b_i x_i >= what has to be saved,   x_i = 1: block i is demoted
    K = (1 - a) C + a diag(C),  a = 1/2

phi are the blocks' Shapley values and C the covariance of their marginals (lrpq.importance.shapley; Zhao et al. 2026,
arXiv:2509.15455). a shrinks what few orders estimate badly. How the source weighs the two terms could not be reached;
here the quadratic one has the weight of a second cumulant: phi . x + 1/2 x^T C x is log E exp of the summed marginals
to second order. Products x_i x_j are linear in a variable of their own (McCormick 1976), exactly so for binaries.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import highspy
import numpy as np

from lrpq.errors import BudgetError, QuantizationError

SHRINKAGE = 0.5
"""CoopQ's a."""
TIME_LIMIT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Demoted:
    """Which blocks are demoted."""

    low: tuple[bool, ...]
    cost: float
    """phi . x + 1/2 x^T K x."""
    bound: float
    """No choice costs less."""
    stopped_early: bool


def shrunk(covariance: Sequence[Sequence[float]], *, shrinkage: float = SHRINKAGE) -> list[list[float]]:
    """K = (1 - a) C + a diag(C)."""
    return [
        [value if i == j else (1 - shrinkage) * value for j, value in enumerate(row)]
        for i, row in enumerate(covariance)
    ]


def cost_of(low: Sequence[bool], values: Sequence[float], pairs: Sequence[Sequence[float]]) -> float:
    """phi . x + 1/2 x^T K x."""
    chosen = [i for i, demoted in enumerate(low) if demoted]
    return math.fsum(values[i] for i in chosen) + 0.5 * math.fsum(pairs[i][j] for i in chosen for j in chosen)


def demote(
    values: Sequence[float],
    pairs: Sequence[Sequence[float]],
    saved_bits: Sequence[int],
    *,
    needed_bits: int,
    time_limit_s: float = TIME_LIMIT_S,
) -> Demoted:
    """Solve the program with HiGHS; deterministic unless the time limit ends the search.

    Args:
        values: phi, of every block.
        pairs: K, symmetric.
        saved_bits: what demoting a block saves; positive.
        needed_bits: what has to be saved in all; at most 0 is nothing.

    Raises:
        BudgetError: not even demoting all blocks saves enough.
        QuantizationError: an estimate is not finite, or HiGHS fails.
    """
    count = len(values)
    if not all(map(math.isfinite, itertools.chain(values, *pairs))):
        raise QuantizationError("coopq: an estimate of a block's worth is not finite")
    if sum(saved_bits) < needed_bits:
        raise BudgetError(f"coopq: all blocks at the narrow choice save {sum(saved_bits)} bits of {needed_bits} needed")
    unit = math.gcd(*saved_bits)
    coupled = [(i, j) for i, j in itertools.combinations(range(count), 2) if pairs[i][j] != 0.0]
    costs = [values[i] + 0.5 * pairs[i][i] for i in range(count)] + [pairs[i][j] for i, j in coupled]
    scale = 2.0 ** -math.frexp(max(map(abs, costs), default=1.0) or 1.0)[1]  # rounds nothing
    rows: list[tuple[float, dict[int, float]]] = [(-(-needed_bits // unit), {i: b / unit for i, b in _of(saved_bits)})]
    for column, (i, j) in enumerate(coupled, start=count):
        if pairs[i][j] > 0:  # only what pulls against the objective needs a bound
            rows.append((-1.0, {column: 1.0, i: -1.0, j: -1.0}))
        else:
            rows += [(0.0, {i: 1.0, column: -1.0}), (0.0, {j: 1.0, column: -1.0})]
    solver = _solver([cost * scale for cost in costs], rows, binaries=count, time_limit_s=time_limit_s)
    status = solver.getModelStatus()
    timed_out = status == highspy.HighsModelStatus.kTimeLimit
    taken = solver.getSolution().col_value
    if (status != highspy.HighsModelStatus.kOptimal and not timed_out) or len(taken) < count:
        raise QuantizationError(f"coopq: HiGHS ended with {solver.modelStatusToString(status)!r}; use another method")
    low = tuple(value > 0.5 for value in taken[:count])
    if sum(b for i, b in _of(saved_bits) if low[i]) < needed_bits:
        raise QuantizationError("coopq: HiGHS returned a plan outside of the budget; use another method")
    cost = cost_of(low, values, pairs)
    bound = min(solver.getInfo().mip_dual_bound / scale, cost)
    return Demoted(low=low, cost=cost, bound=bound, stopped_early=timed_out)


def _of(saved_bits: Sequence[int]) -> list[tuple[int, int]]:
    return list(enumerate(saved_bits))


def _solver(
    costs: Sequence[float], rows: Sequence[tuple[float, dict[int, float]]], *, binaries: int, time_limit_s: float
) -> highspy.Highs:
    """Run HiGHS on: minimise costs . z, every row at least its bound, the first columns binary, the rest in [0, 1]."""
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = len(costs), len(rows)
    lp.col_cost_ = np.array(costs)
    lp.col_lower_, lp.col_upper_ = np.zeros(len(costs)), np.ones(len(costs))
    lp.row_lower_ = np.array([bound for bound, _ in rows], dtype=float)
    lp.row_upper_ = np.full(len(rows), highspy.kHighsInf)
    integer, free = highspy.HighsVarType.kInteger, highspy.HighsVarType.kContinuous
    lp.integrality_ = [integer if column < binaries else free for column in range(len(costs))]
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_ = np.cumsum([0, *(len(entries) for _, entries in rows)])
    lp.a_matrix_.index_ = np.array([column for _, entries in rows for column in entries])
    lp.a_matrix_.value_ = np.array([value for _, entries in rows for value in entries.values()], dtype=float)
    solver = highspy.Highs()
    for option, value in {
        "output_flag": False,
        "threads": 1,
        "random_seed": 0,
        "time_limit": time_limit_s,
        "mip_rel_gap": 1e-6,
        "mip_feasibility_tolerance": 1e-9,
        "primal_feasibility_tolerance": 1e-9,
        "dual_feasibility_tolerance": 1e-9,
    }.items():
        solver.setOptionValue(option, value)
    if highspy.HighsStatus.kError in (solver.passModel(lp), solver.run()):
        raise QuantizationError(f"coopq: HiGHS failed on {binaries} blocks; use another method")
    return solver
