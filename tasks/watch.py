"""Who is overdue: the signs of life of the workers, and when their absence means that one must be given up.

A process that is stopped, swapped out or on a machine that froze looks alive to Ray: its sockets stay open. Workers
therefore count what they finish (micro-batches, modules, calls), and a thread beside the computing one answers with
these numbers when it is asked. Two things can go wrong:

- *Silence*: nothing answers at all. The limit is ``patience``, or five times the median step of the function that the
  worker runs where that is longer.
- *Standstill*: the process answers and finishes nothing. Only a deadlock or a lost device does that, and how long a
  step takes varies with the layer, so the limit is ``STANDSTILL_SECONDS`` or five times the median, and there is none
  before a step of the same function has been seen.

Nothing here knows Ray or a clock, so that every rule can be tested.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field

OVERDUE = 5.0
"""Times the median."""
STANDSTILL_SECONDS = 900.0
START_SECONDS = 300.0
"""Longest time from the creation of a worker to its first answer: it imports torch."""
MOST_AT_ONCE = 2.0
"""Seconds that one look adds to a silence."""
_REMEMBERED = 200
"""Steps of a function that make its median."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulse:
    """A worker's answer."""

    step: str
    """Name of the function that it runs; empty when it is idle."""
    seconds: float
    """Since it last finished something."""
    steps: tuple[tuple[str, float], ...] = ()
    """Function and seconds of what it finished since it was last asked."""
    place: tuple[str, int] | None = None
    """The node's id and the process's."""


@dataclass(slots=True)
class _Seen:
    silence: float = 0.0
    """Seconds that a question has waited for its answer while we looked."""
    pulse: Pulse | None = None


@dataclass(slots=True, kw_only=True)
class Watch:
    """Signs of life of a pool's workers, which are named by any hashable."""

    patience: float
    """Seconds of silence that are always allowed."""
    _seen: dict[object, _Seen] = field(default_factory=dict)
    _steps: dict[str, deque[float]] = field(default_factory=dict)

    def created(self, worker: object) -> None:
        """A worker is on its way."""
        self._seen[worker] = _Seen()

    def heard(self, worker: object, pulse: Pulse) -> None:
        """A worker answered."""
        self._seen[worker] = _Seen(pulse=pulse)
        for step, seconds in pulse.steps:
            self._steps.setdefault(step, deque(maxlen=_REMEMBERED)).append(seconds)

    def waited(self, worker: object, seconds: float) -> None:
        """A worker has not answered for this much longer.

        Where much more time has passed since we last looked, it was we who were busy or stopped: little of it counts.
        """
        self._seen[worker].silence += min(seconds, MOST_AT_ONCE)

    def forget(self, worker: object) -> None:
        """A worker is gone."""
        self._seen.pop(worker, None)

    def has_started(self, worker: object) -> bool:
        """Whether it ever answered."""
        return worker in self._seen and self._seen[worker].pulse is not None

    def median(self, step: str) -> float | None:
        """Seconds of the function's median step; None if none was seen."""
        steps = self._steps.get(step)
        return statistics.median(steps) if steps else None

    def why_overdue(self, worker: object) -> str | None:
        """Why a worker is to be given up; None if it is not."""
        seen = self._seen[worker]
        pulse = seen.pulse
        if pulse is None:
            return f"it did not start within {START_SECONDS:.0f} s" if seen.silence > START_SECONDS else None
        median = self.median(pulse.step)
        usual = 0.0 if median is None else OVERDUE * median
        if seen.silence > max(self.patience, usual):
            return f"it was silent for {seen.silence:.0f} s"
        if pulse.step and median is not None and pulse.seconds + seen.silence > max(STANDSTILL_SECONDS, usual):
            return f"it finished nothing for {pulse.seconds + seen.silence:.0f} s, {pulse.step} takes {median:.1f} s"
        return None
