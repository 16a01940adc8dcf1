"""The pool of Ray actors on which every stage computes.

One actor lives through the whole run: it imports torch once and holds what its stage needs between calls (a stream, its
shards). Functions run on it take its state first. Large results return as Ray references and travel from worker to
worker through the object store, not through the driver.

Workers die, with or without their machine, and workers hang. Both end in ``WorkerLost`` at whoever waits; ``renew``
then gives the pool as many live workers as the cluster has room for, each holding nothing, and the stage goes on from
what the store has. ``map``, whose items need nothing of each other, does both itself and repeats only what was lost.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import ray

from lrpq.errors import ClusterError, WorkerLost
from tasks.end_process import end_process
from tasks.resources import WorkerShape, workers_that_fit
from tasks.results import Ref, value_of
from tasks.roll_call import PATIENCE_SECONDS, POLL_SECONDS, RollCall
from tasks.watch import START_SECONDS
from tasks.worker import Place, Worker, WorkerState

__all__ = ["Pool", "Ref", "WorkerState"]

T = TypeVar("T")
SOME_START_SECONDS = 60.0
"""How long a renewed pool waits for new workers where it has some."""
MAX_DEATHS = 3
"""Workers that one item of ``map`` may cost before it is the item's fault."""
AT_ONCE = 2
"""Items of ``map`` a worker has under way: one computes, one waits, or reads and stores where they overlap."""

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # the first worker's error is raised; Ray would log those of the others
    "TOKENIZERS_PARALLELISM": "false",
}

_HEAP = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(64 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
}
"""glibc's settings for a worker on a CPU: one heap, of which up to 256 MiB of what is freed wait for what comes.

By default each tensor of 32 MiB or more, such as the attention of four windows, has pages of its own, which the kernel
clears anew; for the thread that computes, which is not the main one, so do heaps of 64 MiB. That was a quarter of the
profile's processor time. What is free at the end of a block goes back all the same (lrpq.model.host_memory). Of one
process, 6 blocks of SmolLM2: 2.6 s of system time and a peak of 990 MB by default, 1.1 and 1,087 like this, .7 and
1,133 with 512 MiB for both.
"""


class Pool:
    """Workers that run functions of the stages."""

    def __init__(
        self,
        shape: WorkerShape,
        *,
        device: str,
        threads: int,
        patience: float = PATIENCE_SECONDS,
        spill_folder: str | None = None,
        low_memory: bool = False,
    ) -> None:
        self.shape = shape
        self.losses: list[str] = []
        """Why workers were given up, since the pool was made."""
        self.workers: list[Any] = []
        self._epoch = 0
        self._roll = RollCall(self.workers, patience=patience)
        self._changed = False
        """Whether workers have come or gone since everyone was given a place."""
        environment = {**QUIET, **{k: str(threads) for k in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}}
        if device == "cpu":
            environment |= _HEAP
        groups = {"pulse": 1, "beside": 1, "passing": 1, "overlapped": AT_ONCE}
        self._actor = ray.remote(concurrency_groups=groups)(Worker).options(
            num_cpus=shape.num_cpus, num_gpus=shape.num_gpus, runtime_env={"env_vars": environment}
        )
        self._settings = {
            "device": device,
            "threads": threads,
            "kept_bytes": shape.kept_bytes,
            "spill_folder": spill_folder,
            "low_memory": low_memory,
            "host_threads": shape.host_threads,
        }
        for index in range(shape.num_workers):
            self._start(Place(index=index, num_workers=shape.num_workers, epoch=0))

    def __len__(self) -> int:
        return len(self.workers)

    def submit(self, worker: int, function: Callable[..., Any], *arguments: Any) -> Ref:
        """Run a function on one worker; arguments that are references are resolved there."""
        return self.workers[worker].call.remote(self._epoch, function, *arguments)

    def submit_beside(self, worker: int, function: Callable[..., Any], *arguments: Any) -> Ref:
        """As ``submit``, beside what the worker computes: for functions that store what they are given."""
        method = self.workers[worker].beside.options(concurrency_group="beside")
        return method.remote(self._epoch, function, *arguments)

    def submit_passing(self, worker: int, function: Callable[..., Any], *arguments: Any) -> Ref:
        """As ``submit_beside``, in yet another thread: for functions that hand over what others store."""
        method = self.workers[worker].beside.options(concurrency_group="passing")
        return method.remote(self._epoch, function, *arguments)

    def each(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Run a function with the same arguments on every worker and wait for the results."""
        return self.get(self.each_refs(function, *arguments))

    def each_refs(self, function: Callable[..., Any], *arguments: Any) -> list[Ref]:
        """As ``each``, without waiting: references to the results."""
        if self._changed:  # in a ``map`` before: a stage in the middle of its calls would have had a WorkerLost
            self.renew()
        return [self.submit(i, function, *arguments) for i in range(len(self))]

    def get(self, references: Sequence[Ref]) -> list[Any]:
        """Wait for results.

        Raises:
            LrpqError: as raised on the worker, without Ray's wrapping.
            WorkerLost: a worker died or had to be given up.
        """
        found: dict[Ref, Any] = {}
        waiting = list(dict.fromkeys(references))
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=POLL_SECONDS)
            for reference in ready:
                found[reference] = value_of(reference)
            if waiting:
                self._give_up_overdue()
        return [found[reference] for reference in references]

    def map(
        self, function: Callable[..., T], items: Sequence[tuple[Any, ...]], *, overlap: bool = False
    ) -> Iterator[tuple[int, T]]:
        """Run a function over items, each on the next idle worker; yields (position, result) as they end.

        At most two items a worker are under way: memory stays bounded whatever the number of items. What a lost worker
        had under way is run again by others.

        Args:
            function: run with the worker's state and an item.
            items: arguments of each call.
            overlap: a worker runs two items at a time, one of which computes (``state.computing``) while the other
                reads or stores.

        Raises:
            ClusterError: an item was under way on three workers that were lost, or no worker is left.
        """
        todo = deque(range(len(items)))
        running: dict[Ref, tuple[int, Any]] = {}
        deaths = [0] * len(items)

        def fill() -> None:
            ready = [worker for worker in self.workers if self._roll.has_started(worker)]  # others may never be
            for turn in range(AT_ONCE):  # there and back: where items come largest first, nobody has the larger of both
                for worker in ready[:: (-1) ** turn]:
                    if todo and sum(owner == worker for _, owner in running.values()) < AT_ONCE:
                        position = todo.popleft()
                        running[self._item(worker, overlap).remote(self._epoch, function, *items[position])] = (
                            position,
                            worker,
                        )

        def repeat(worker: Any) -> None:
            under_way = sorted(position for position, owner in running.values() if owner == worker)
            for reference in [ref for ref, (_, owner) in running.items() if owner == worker]:
                del running[reference]
            for position in under_way[:1]:  # the first is what it was at; the other one waited
                deaths[position] += 1
                if deaths[position] >= MAX_DEATHS:
                    raise ClusterError(
                        f"{function.__name__}: the same item was under way on {MAX_DEATHS} workers that were lost "
                        f"({self.losses[-1]}); there may be too little memory: use fewer workers"
                    )
            todo.extendleft(reversed(under_way))
            self._replace(worker)

        while todo or running:
            for worker, why in self._roll.overdue().items():
                self._drop(worker, why)
                repeat(worker)
            fill()
            if not running:
                time.sleep(POLL_SECONDS / 5)
                continue
            ready, _ = ray.wait(list(running), num_returns=1, timeout=POLL_SECONDS)
            for reference in ready:
                position, worker = running[reference]
                try:
                    value = value_of(reference)
                except WorkerLost as loss:
                    self._drop(worker, str(loss))
                    repeat(worker)
                    continue
                del running[reference]
                fill()
                yield position, value

    @staticmethod
    def _item(worker: Any, overlap: bool) -> Any:
        """The method that runs an item of ``map``."""
        return worker.overlapped.options(concurrency_group="overlapped") if overlap else worker.call

    def renew(self) -> None:
        """Replace the workers that are gone and give everyone a new place; afterwards no worker holds anything.

        The pool is smaller where the cluster has become so.

        Raises:
            ClusterError: no worker could be started.
        """
        while True:
            try:
                self._renew()
                return
            except WorkerLost:  # another one, in the meantime; _renew has at least one worker or raises
                continue

    def _renew(self) -> None:
        for worker, why in self._roll.dead().items():
            self._drop(worker, why)
        for _ in range(self._room()):
            self._start(Place(index=0, num_workers=1, epoch=self._epoch))
        self._keep_started()
        self._epoch += 1
        places = [Place(index=i, num_workers=len(self), epoch=self._epoch) for i in range(len(self))]
        self.get(
            [
                worker.move.options(concurrency_group="pulse").remote(place)
                for worker, place in zip(self.workers, places, strict=True)
            ]
        )
        self.get([worker.clear.remote() for worker in self.workers])
        self._changed = False

    def _start(self, place: Place) -> Any:
        worker = self._actor.remote({**self._settings, "place": place})
        self.workers.append(worker)
        self._roll.created(worker)
        return worker

    def _replace(self, lost: Any) -> None:
        """Have another worker in place of one that is lost, if the cluster has room for it, or none at all is left."""
        if self._room():
            self._start(Place(index=0, num_workers=1, epoch=self._epoch))
        if not self.workers:
            raise ClusterError(f"no worker is left ({self.losses[-1]}); the same command continues on another cluster")

    def _fitting(self) -> int:
        """Workers that the cluster, as it is now, has room for."""
        total = ray.cluster_resources()
        return workers_that_fit(self.shape, cluster_cpus=total.get("CPU", 0.0), cluster_gpus=total.get("GPU", 0.0))

    def _room(self) -> int:
        """Workers that may be started: at most as many as there were at first, at least one if none is left."""
        return max(min(self.shape.num_workers, self._fitting()) - len(self), 0 if self.workers else 1)

    def _keep_started(self) -> None:
        """Wait for the workers on their way; those that do not start are left out.

        Where others have started the wait is short, and it ends once Ray has noticed that a machine is gone, which
        takes it a quarter of a minute.
        """
        started = time.monotonic()
        while True:
            self._roll.look()
            missing = [worker for worker in self.workers if not self._roll.has_started(worker)]
            if not missing:
                break
            some = len(missing) < len(self.workers)
            waited = time.monotonic() - started
            if waited > (SOME_START_SECONDS if some else START_SECONDS) or (some and self._fitting() < len(self)):
                for worker in missing:
                    self._drop(worker, "it did not start")
                break
            time.sleep(POLL_SECONDS / 5)
        if not self.workers:
            raise ClusterError(
                f"no worker started within {START_SECONDS:.0f} s; the same command continues once the cluster has room"
            )

    def _give_up_overdue(self) -> None:
        """Raise WorkerLost for the first worker that is overdue, after ending it."""
        for worker, why in self._roll.overdue().items():
            self._drop(worker, why)
            raise WorkerLost(why)

    def _drop(self, worker: Any, why: str) -> None:
        """Give a worker up: nothing it still writes can be published over another's, but it may hold memory."""
        if worker not in self.workers:
            return
        self.workers.remove(worker)
        self.losses.append(why)
        self._changed = True
        where = self._roll.forget(worker)
        with suppress(ray.exceptions.RayError):
            ray.kill(worker)
        if where is not None:
            end_process(*where)
