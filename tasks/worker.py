"""The process on which stages compute: what it holds between calls, and its signs of life."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from lrpq.model.host_memory import release_freed_memory
from tasks.store.host_threads import set_host_threads
from tasks.tensor_transport import send_tensors_by_buffer
from tasks.watch import Pulse

_MOST_RUNS = ("tasks.profile", "tasks.candidates", "tasks.refine")
"""Modules of stages that are imported as a worker starts, beside what the driver starts and reads meanwhile; with
transformers and numba they take seconds, which a stage would wait for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Which worker of how many this is. A pool that lost some of its workers gives out new places."""

    index: int
    num_workers: int
    epoch: int
    """Counts the changes; a call of an earlier epoch is not run any more."""


class StaleCall(Exception):  # never seen by a user: the driver has given up its reference
    """The call was made before the pool changed."""


@dataclass(slots=True, kw_only=True)
class _UnderWay:
    """A call that a thread runs."""

    step: str
    """Name of its function."""
    since: float
    """When it began, or last finished something."""
    beside: bool
    """Whether it only stores what others have computed."""


class WorkerState:
    """What a worker keeps between calls."""

    def __init__(
        self,
        *,
        device: str,
        threads: int,
        kept_bytes: int,
        place: Place,
        spill_folder: str | None = None,
        low_memory: bool = False,
        host_threads: int = 1,
    ) -> None:
        self.device = device
        self.threads = threads
        self.host_threads = host_threads
        """Threads that move bytes (tasks.store.host_threads)."""
        self.kept_bytes = kept_bytes
        self.spill_folder = None if spill_folder is None else Path(spill_folder)
        self.low_memory = low_memory
        """On a GPU, what is not at work waits in host memory."""
        self.place = place
        self.held: dict[str, Any] = {}
        """Stage name -> the stage's own object."""
        self.computing = threading.Lock()
        """Held by a call that overlaps with others (Pool.map) while it computes: they read and store meanwhile."""
        self._stage = ""
        """Module of the function that ran last."""
        self._under_way: dict[int, _UnderWay] = {}
        """By thread."""
        self._idle_since = time.monotonic()
        self._steps: list[tuple[str, float]] = []

    @property
    def index(self) -> int:
        """Of this worker among ``num_workers``."""
        return self.place.index

    @property
    def num_workers(self) -> int:
        """Workers of the pool."""
        return self.place.num_workers

    def beat(self) -> None:
        """The call that this thread runs has finished something: a micro-batch, a module."""
        now = time.monotonic()
        call = self._under_way.get(threading.get_ident())
        if call is not None:
            self._steps.append((call.step, now - call.since))
            call.since = now
        self._idle_since = now

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run a function of a stage; its end is a sign of life too."""
        if function.__module__ != self._stage:  # what the stage before has freed need not lie beside this one's
            release_freed_memory()
            self._stage = function.__module__
        return self._run(function, *arguments, beside=False)

    def run_beside(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run a function in a thread beside ``run``; its end is a sign of life of its own."""
        return self._run(function, *arguments, beside=True)

    def _run(self, function: Callable[..., Any], *arguments: Any, beside: bool) -> Any:
        thread = threading.get_ident()
        set_host_threads(self.host_threads)
        self._under_way[thread] = _UnderWay(step=function.__qualname__, since=time.monotonic(), beside=beside)
        try:
            return function(self, *arguments)
        finally:
            self.beat()
            del self._under_way[thread]

    def pulse(self) -> Pulse:
        """What was finished since the last time; asked from another thread.

        Of several calls under way, the one that finished something longest ago is the worker's step; what runs beside
        is it only where nothing else runs.
        """
        steps, self._steps = self._steps, []
        now, calls = time.monotonic(), list(self._under_way.values())
        calls = [call for call in calls if not call.beside] or calls
        if not calls:
            return Pulse(step="", seconds=now - self._idle_since, steps=tuple(steps))
        oldest = min(calls, key=lambda call: call.since)
        return Pulse(step=oldest.step, seconds=now - oldest.since, steps=tuple(steps))

    def close_copies(self) -> None:
        """End the copies that a stage has opened (tasks.streams.open_copies), if it has."""
        copies = self.held.pop("copies", None)
        if copies is not None:
            copies.close()

    def clear(self) -> None:
        """Forget what stages hold; what is on disk goes with it."""
        blocks = self.held.pop("blocks", None)
        with self.computing, ExitStack() as stack:  # each of them, also where another fails
            if blocks is not None:
                stack.callback(blocks.close)
            stack.callback(self.held.clear)
            stack.callback(self.close_copies)
            for held in self.held.values():
                kept = getattr(held, "kept", None)
                if kept is not None:
                    stack.callback(kept.close)


class Worker:
    """Body of the actor.

    ``call`` and ``clear`` run one at a time; ``overlapped`` in two threads of its own; ``beside`` in one that stores,
    and in one that passes on what others store; ``pulse`` and ``move`` in the last.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        from lrpq.determinism import compute_deterministically
        from lrpq.quant.ahead import compile_ahead

        compute_deterministically()
        send_tensors_by_buffer()
        for module in _MOST_RUNS:
            import_module(module)
        if settings["device"] == "cpu":  # others compile for theirs
            threading.Thread(target=compile_ahead, name="lrpq-compile", daemon=True).start()
        self.state = WorkerState(**settings)
        self.state.beat()
        self._threads = settings["threads"]

    def call(self, epoch: int, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run a function of a stage, unless the pool has changed since it was asked for."""
        self._begin(epoch)
        return self.state.run(function, *arguments)

    def overlapped(self, epoch: int, function: Callable[..., Any], *arguments: Any) -> Any:
        """As ``call``, two at a time: for functions that compute, and touch what is held, under ``state.computing``."""
        self._begin(epoch)
        return self.state.run(function, *arguments)

    def beside(self, epoch: int, function: Callable[..., Any], *arguments: Any) -> Any:
        """As ``call``, in a thread beside it: for functions that store what they are given or what is held for them."""
        self._begin(epoch)
        return self.state.run_beside(function, *arguments)

    def _begin(self, epoch: int) -> None:
        import torch

        if epoch != self.state.place.epoch:
            raise StaleCall
        if torch.get_num_threads() != self._threads:  # a setting of the thread, which is not that of __init__
            torch.set_num_threads(self._threads)

    def clear(self) -> None:
        """Forget what stages hold."""
        self.state.clear()

    def pulse(self) -> Pulse:
        """See WorkerState."""
        import ray

        return replace(self.state.pulse(), place=(ray.get_runtime_context().get_node_id(), os.getpid()))

    def move(self, place: Place) -> None:
        """Take another place: calls that wait end at once."""
        self.state.place = place
