"""The pool of Ray actors on which every stage computes.

One actor lives through the whole run: it imports torch once and holds what its stage needs between calls (a stream, its
shards). Functions run on it take its state first. Large results return as Ray references and travel from worker to
worker through the object store, not through the driver.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import ray

from lrpq.errors import ConfigError, LrpqError
from tasks.resources import WorkerShape, object_store_bytes, worker_shape

T = TypeVar("T")
Ref = Any
"""A ray.ObjectRef."""

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # the first worker's error is raised; Ray would log those of the others
    "TOKENIZERS_PARALLELISM": "false",
}


class WorkerState:
    """What a worker keeps between calls."""

    def __init__(self, *, index: int, device: str, threads: int, kept_bytes: int) -> None:
        self.index = index
        self.device = device
        self.threads = threads
        self.kept_bytes = kept_bytes
        self.held: dict[str, Any] = {}
        """Stage name -> the stage's own object."""


class _Worker:
    """Body of the actor."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import torch

        torch.set_num_threads(settings["threads"])
        torch.use_deterministic_algorithms(True)
        self.state = WorkerState(**settings)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(self.state, *arguments)


class Pool:
    """Workers that run functions of the stages."""

    def __init__(self, shape: WorkerShape, *, device: str, threads: int) -> None:
        self.shape = shape
        environment = {**QUIET, **{k: str(threads) for k in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}}
        if device == "cuda":
            environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # deterministic matrix products
        actor = ray.remote(_Worker)
        self.workers = [
            actor.options(
                num_cpus=shape.num_cpus,
                num_gpus=shape.num_gpus,
                runtime_env={"env_vars": environment},
            ).remote({"index": i, "device": device, "threads": threads, "kept_bytes": shape.kept_bytes})
            for i in range(shape.num_workers)
        ]

    def __len__(self) -> int:
        return len(self.workers)

    def submit(self, worker: int, function: Callable[..., Any], *arguments: Any) -> Ref:
        """Run a function on one worker; arguments that are references are resolved there."""
        return self.workers[worker].call.remote(function, *arguments)

    def each(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Run a function with the same arguments on every worker and wait for the results."""
        return self.get([self.submit(i, function, *arguments) for i in range(len(self))])

    def each_refs(self, function: Callable[..., Any], *arguments: Any) -> list[Ref]:
        """As ``each``, without waiting: references to the results."""
        return [self.submit(i, function, *arguments) for i in range(len(self))]

    def get(self, references: Sequence[Ref]) -> list[Any]:
        """Wait for results.

        Raises:
            LrpqError: as raised on the worker, without Ray's wrapping.
        """
        try:
            return list(ray.get(list(references)))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, LrpqError):
                raise error.cause from None
            raise

    def map(self, function: Callable[..., T], items: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, T]]:
        """Run a function over items, each on the next idle worker; yields (position, result) as they end.

        At most two items a worker are under way: memory stays bounded whatever the number of items.
        """
        waiting = iter(enumerate(items))
        running: dict[Ref, tuple[int, int]] = {}

        def start(worker: int) -> None:
            following = next(waiting, None)
            if following is not None:
                position, arguments = following
                running[self.submit(worker, function, *arguments)] = (position, worker)

        for _ in range(2):
            for worker in range(len(self)):
                start(worker)
        while running:
            ready, _ = ray.wait(list(running), num_returns=1)
            position, worker = running.pop(ready[0])
            start(worker)
            yield position, self.get(ready)[0]


@contextmanager
def open_pool(*, device: str, workers: int | None, threads: int, address: str | None = None) -> Iterator[Pool]:
    """Connect to a Ray cluster, or start one on this machine for the length of the context.

    Args:
        device: "auto", "cpu" or "cuda".
        workers: number of workers, None for one a GPU or core.
        threads: intra-op threads of a worker: part of the result's identity.
        address: address of a running cluster.
    """
    os.environ.update({k: v for k, v in QUIET.items() if k not in os.environ})
    resolved = resolve_device(device)
    local_cpus = len(os.sched_getaffinity(0))
    wanted_cpus = max(local_cpus, (workers or 1) * threads)
    if address is None:
        ray.init(
            address="local",  # without it, Ray joins any cluster that it finds on this machine
            num_cpus=wanted_cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            object_store_memory=_object_store_bytes(),
        )
    else:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    try:
        cluster = ray.cluster_resources()
        shape = worker_shape(
            device=resolved,
            requested=workers,
            threads=threads,
            cluster_cpus=cluster.get("CPU", 1.0),
            cluster_gpus=cluster.get("GPU", 0.0),
            free_bytes=_free_bytes(),
        )
        yield Pool(shape, device=resolved, threads=threads)
    finally:
        ray.shutdown()


def resolve_device(device: str) -> str:
    """Turn "auto" into "cuda" where a GPU is, else "cpu".

    Raises:
        ConfigError: a GPU was asked for and none is there.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda: no GPU is visible here; use --device cpu or check the driver")
    return device


def _free_bytes() -> int:
    import psutil

    return int(psutil.virtual_memory().available)


def _object_store_bytes() -> int:
    return object_store_bytes(_free_bytes())
