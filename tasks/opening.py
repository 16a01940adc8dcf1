"""A pool on a cluster that is running, or on one that is started for it on this machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import ray

from lrpq.errors import ConfigError
from tasks.cluster import QUIET, Pool
from tasks.resources import object_store_bytes, worker_shape
from tasks.roll_call import PATIENCE_SECONDS

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - looked at only
"""Where Ray keeps its objects on Linux."""


@contextmanager
def open_pool(
    *,
    device: str,
    workers: int | None,
    threads: int,
    address: str | None = None,
    patience: float = PATIENCE_SECONDS,
    kept_bytes: int | None = None,
    spill_folder: str | None = None,
    low_memory: bool = False,
) -> Iterator[Pool]:
    """Connect to a Ray cluster, or start one on this machine for the length of the context.

    Args:
        device: "auto", "cpu" or "cuda".
        workers: number of workers, None for one a GPU or core.
        threads: intra-op threads of a worker: part of the result's identity.
        address: address of a running cluster.
        patience: seconds of silence after which a worker may be given up.
        kept_bytes: memory for a worker's kept inputs, None for its share of a quarter of the free memory.
        spill_folder: where the rest of them go, None for the system's temporary folder.
        low_memory: on GPUs, what is not at work waits in host memory.
    """
    os.environ.update({k: v for k, v in QUIET.items() if k not in os.environ})
    _keep_stdout_clean()
    resolved = resolve_device(device)
    local_cpus = len(os.sched_getaffinity(0))
    wanted_cpus = max(local_cpus, (workers or 1) * threads)
    if address is None:
        ray.init(
            address="local",  # without it Ray joins a cluster that somebody else started on this machine
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
        if kept_bytes is not None:
            shape = replace(shape, kept_bytes=kept_bytes)
        yield Pool(
            shape,
            device=resolved,
            threads=threads,
            patience=patience,
            spill_folder=spill_folder,
            low_memory=low_memory,
        )
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


def _keep_stdout_clean() -> None:
    """Keep Ray's paragraph about a worker that died off stdout, which may be a JSON document: we report it ourselves.

    Ray 2.60 prints it whatever ``log_to_driver`` says, and has no setting for it.
    """
    from ray._private import worker

    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = lambda *_, **__: None


def _free_bytes() -> int:
    import psutil

    return int(psutil.virtual_memory().available)


def _object_store_bytes() -> int:
    """Many gigabytes only where the shared memory has room for them: else Ray takes a folder on disk for all of it."""
    room = shutil.disk_usage(SHARED_MEMORY).free * 9 // 10 if SHARED_MEMORY.is_dir() else 0
    return min(object_store_bytes(_free_bytes()), max(room, 8 << 30))
