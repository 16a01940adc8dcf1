"""Measured swap moves: bits handed from one layer to another at equal storage, where the model says that it is better.

An allocation adds up costs of single layers. What it cannot see, that layers' errors meet, is measured here for a few
moves around its plan: the ones that its own costs like best, since every move costs a pass over the windows.
"""

from __future__ import annotations

import heapq
import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from lrpq.allocate.options import CostRow
from lrpq.errors import QuantizationError
from lrpq.model.layers import Choice

Choices = Mapping[str, Choice]
Measure = Callable[[Sequence[Choices]], Sequence[Sequence[float]]]
"""From plans to the KL divergence of each on every held-out window, nats per token."""

ROUNDS = 4
"""A move is made at most once a round."""
MOVES_A_ROUND = 8
"""Measured in one pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One layer's bits fall, another's rise; storage stays."""

    fallen: tuple[str, Choice]
    risen: tuple[str, Choice]
    predicted_nats: float
    """Change of the sum of costs."""

    def of(self, choices: Choices) -> dict[str, Choice]:
        """The plan after the move."""
        return {**choices, **dict((self.fallen, self.risen))}


@dataclass(frozen=True, slots=True, kw_only=True)
class Swapped:
    """A plan after the moves that were accepted."""

    choices: dict[str, Choice]
    num_tried: int
    num_accepted: int


def swap_moves(
    rows: Sequence[CostRow], choices: Choices, *, at_most: int, without: Collection[Move] = ()
) -> list[Move]:
    """The moves of least predicted cost, cheapest first; ties by name.

    Args:
        rows: what every module costs and takes at every choice.
        choices: the plan; modules outside of it are not moved.
        at_most: how many.
        without: moves that were measured already.
    """
    table: dict[str, dict[Choice, CostRow]] = {}
    for row in rows:
        if row.choice is not None and row.module.name in choices:
            table.setdefault(row.module.name, {})[row.choice] = row
    falling: dict[int, list[tuple[float, str, Choice]]] = {}
    rising: dict[int, list[tuple[float, str, Choice]]] = {}
    for name, options in sorted(table.items()):
        here = options[choices[name]]
        for choice, row in sorted(options.items()):
            change = row.storage_bits - here.storage_bits
            if change:
                side = falling if change < 0 else rising
                side.setdefault(abs(change), []).append((row.cost_nats - here.cost_nats, name, choice))
    moves = (
        Move(fallen=(low, to), risen=(high, up), predicted_nats=lost + gained)
        for size, fallen in falling.items()
        for lost, low, to in fallen
        for gained, high, up in rising.get(size, ())
        if low != high
    )
    tried = {(move.fallen, move.risen) for move in without}
    new = (move for move in moves if (move.fallen, move.risen) not in tried)
    return heapq.nsmallest(at_most, new, key=lambda move: (move.predicted_nats, move.fallen, move.risen))


def with_swaps(
    rows: Sequence[CostRow],
    choices: Choices,
    measure: Measure,
    *,
    rounds: int = ROUNDS,
    moves_a_round: int = MOVES_A_ROUND,
) -> Swapped:
    """Measure a few moves a round and make the best one, if the KL falls; no move is measured twice.

    It falls if the mean of the paired differences is below zero by more than its standard error over windows: of
    several moves the best one looks better than it is.

    Raises:
        QuantizationError: a measurement is not finite.
    """
    plan, tried, accepted = dict(choices), 0, 0
    known: set[Move] = set()
    for _ in range(rounds):
        moves = swap_moves(rows, plan, at_most=moves_a_round, without=known)
        if not moves:
            break
        known.update(moves)
        before, *after = measure([plan, *(move.of(plan) for move in moves)])
        tried += len(moves)
        falls = [_fall(before, values) for values in after]
        best = max(range(len(moves)), key=lambda index: falls[index][0])
        fall, error = falls[best]
        if fall > error:
            plan = moves[best].of(plan)
            accepted += 1
    return Swapped(choices=plan, num_tried=tried, num_accepted=accepted)


def _fall(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """How far the KL falls, and the standard error of that; with one window the error is zero."""
    falls = [a - b for a, b in zip(before, after, strict=True)]
    if not all(map(math.isfinite, falls)):
        raise QuantizationError("swaps: a measured KL divergence is not finite")
    error = statistics.stdev(falls) / math.sqrt(len(falls)) if len(falls) > 1 else 0.0
    return statistics.fmean(falls), error
