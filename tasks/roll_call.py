"""Asking workers for signs of life, and taking their answers as they come; the rules are in watch.py."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import ray

from lrpq.errors import WorkerLost
from tasks.results import Ref, value_of
from tasks.watch import Watch

POLL_SECONDS = 0.5
"""How often workers are asked while somebody waits for them."""
PATIENCE_SECONDS = 30.0
"""Silence that is always allowed: a thread that answers may wait for Python's lock, or for a busy machine."""


class RollCall:
    """Who of a pool's workers lives.

    Args:
        workers: the pool's own list: those that are in it are asked.
        patience: seconds of silence after which a worker may be given up.
    """

    def __init__(self, workers: Sequence[Any], *, patience: float) -> None:
        self._workers = workers
        self._watch = Watch(patience=patience)
        self._asked: dict[Any, Ref] = {}
        self._where: dict[Any, tuple[str, int]] = {}
        self._looked = 0.0

    def created(self, worker: Any) -> None:
        """A worker is on its way."""
        self._watch.created(worker)

    def has_started(self, worker: Any) -> bool:
        """Whether it has ever answered."""
        return self._watch.has_started(worker)

    def forget(self, worker: Any) -> tuple[str, int] | None:
        """The worker is given up; returns its node and process, where they are known."""
        self._watch.forget(worker)
        self._asked.pop(worker, None)
        return self._where.pop(worker, None)

    def overdue(self) -> dict[Any, str]:
        """Workers that are dead or to be given up, and why."""
        dead = self.look()
        why = {worker: self._watch.why_overdue(worker) for worker in self._workers if worker not in dead}
        return {**dead, **{worker: reason for worker, reason in why.items() if reason is not None}}

    def dead(self) -> dict[Any, str]:
        """Ask every worker that has started and wait for the answers; those that do not answer are taken for dead."""
        dead: dict[Any, str] = {}
        deadline = time.monotonic() + self._watch.patience
        self._looked = -math.inf  # ask everyone now
        while True:
            dead |= self.look()
            silent = [w for w in self._asked if w not in dead and self._watch.has_started(w)]
            if not silent or time.monotonic() > deadline:
                return {**dict.fromkeys(silent, "it does not answer"), **dead}
            time.sleep(POLL_SECONDS / 10)

    def look(self) -> dict[Any, str]:
        """Take the answers that came and ask again; returns the workers that are dead."""
        dead: dict[Any, str] = {}
        passed = time.monotonic() - self._looked
        answers = {reference: worker for worker, reference in self._asked.items()}
        ready = ray.wait(list(answers), num_returns=len(answers), timeout=0)[0] if answers else []
        for reference in ready:
            worker = answers[reference]
            del self._asked[worker]
            try:
                pulse = value_of(reference)
            except WorkerLost as loss:
                dead[worker] = str(loss)
                continue
            self._watch.heard(worker, pulse)
            self._where[worker] = pulse.place
        if passed < POLL_SECONDS / 2:
            return dead
        self._looked = time.monotonic()
        for worker in self._workers:
            if worker in self._asked:
                self._watch.waited(worker, passed)
            elif worker not in dead:
                self._asked[worker] = worker.pulse.options(concurrency_group="pulse").remote()
        return dead
