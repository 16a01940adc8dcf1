"""What a worker needs, from the cluster's size: one pure function, so that it can be planned and tested."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

CPU_WINDOWS = 4
GPU_TOKENS = 1 << 16
GPU_ELEMENTS = 1 << 26
"""Of one micro-batch's hidden states, at most."""
SHARDS = 8
FEWEST_SHARDS = 2
"""On a GPU, where there are two windows: two workers share them."""
WIDE_TOKENS = 1 << 14
"""Of a micro-batch of a model that is wide enough to keep a GPU busy, at most."""
SLACK = 1e-6
"""Of sums of shares such as 1/3."""
HOST_THREADS = 12
"""Of a GPU's worker, at most: each holds some 60 MB while it compresses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerShape:
    """Resources of every worker, and how many workers there are."""

    num_workers: int
    num_cpus: float
    """Cores a worker reserves."""
    num_gpus: float
    kept_bytes: int
    """Memory a worker may fill with kept block inputs before it spills to disk."""
    host_threads: int = 1
    """Threads that move a worker's bytes (tasks.store.host_threads); they change no result. Those of a GPU's worker use
    its share of the cores, of which its computations need one; they reserve none, because they are seldom at work."""

    @property
    def workers_a_gpu(self) -> int:
        """Workers that may be on one GPU, each with all that it needs of its memory; 0 on CPUs."""
        return int((1 + SLACK) / self.num_gpus) if self.num_gpus else 0


def worker_shape(
    *, device: str, requested: int | None, threads: int, cluster_cpus: float, cluster_gpus: float, free_bytes: int
) -> WorkerShape:
    """One worker a GPU, or one for every ``threads`` cores on a CPU; a quarter of the free memory holds kept inputs.

    Args:
        device: "cpu" or "cuda".
        requested: number of workers the user asked for, or None.
        threads: intra-op threads of a worker.
        cluster_cpus: cores of the cluster.
        cluster_gpus: GPUs of the cluster.
        free_bytes: free host memory of the smallest node.
    """
    if device == "cuda":
        available = max(int(cluster_gpus), 1)
        workers = available if requested is None else requested
        share = 1.0 / max(ceil(workers / available), 1)  # whole workers fit on every GPU
        host_threads = max(1, min(HOST_THREADS, int(cluster_cpus // max(workers, available))))
        cpus = min(float(threads), cluster_cpus / workers)
    else:
        available = max(int(cluster_cpus // threads), 1)
        workers = available if requested is None else requested
        share = 0.0
        host_threads = 1
        cpus = min(float(threads), cluster_cpus / workers)
    return WorkerShape(
        num_workers=workers,
        num_cpus=cpus,
        num_gpus=share,
        kept_bytes=max(free_bytes // 4 // workers, 1 << 28),
        host_threads=host_threads,
    )


def windows_at_once(asked: int | None, *, device: str, length: int, hidden: int) -> int:
    """Windows of a micro-batch: part of a result's identity, so it depends on the kind of device and on no sizes of it.

    A GPU waits for launches where a block's operations are small; on a CPU four windows are fastest and take little
    memory (docs/log.md).

    Args:
        asked: what the configuration says, if anything.
        device: "cpu" or "cuda".
        length: tokens of a window.
        hidden: width of the hidden states.
    """
    if asked is not None:
        return asked
    if device != "cuda":
        return CPU_WINDOWS
    return max(1, min(GPU_TOKENS, GPU_ELEMENTS // hidden) // length)


def shards_of(asked: int | None, *, device: str, num_windows: int, length: int, micro_batch: int) -> int:
    """Parts of the calibration windows, part of a result's identity as well; none is empty.

    On a GPU the windows of a narrow model, which has large micro-batches, are cut into as few parts as those: what they
    wait for is launches, of which eight workers with an eighth of the windows each would have as many as two with a
    half.

    Args:
        asked: what the configuration says, if anything.
        device: "cpu" or "cuda".
        num_windows: calibration windows.
        length: tokens of a window.
        micro_batch: of them computed at once (`windows_at_once`).
    """
    shards = SHARDS if asked is None else asked
    if asked is None and device == "cuda" and micro_batch * length > WIDE_TOKENS:
        shards = min(SHARDS, max(FEWEST_SHARDS, ceil(num_windows / micro_batch)))
    return min(shards, num_windows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """How calibration windows are cut."""

    shards: int
    micro_batch: int


def cut_of(*, device: str, num_windows: int, length: int, hidden: int, micro_batch: int | None = None) -> Cut:
    """As `lrpq compress` cuts them by default; arguments as of `windows_at_once` and `shards_of`."""
    at_once = windows_at_once(micro_batch, device=device, length=length, hidden=hidden)
    shards = shards_of(None, device=device, num_windows=num_windows, length=length, micro_batch=at_once)
    return Cut(shards=shards, micro_batch=at_once)


def workers_that_fit(shape: WorkerShape, *, cluster_cpus: float, cluster_gpus: float) -> int:
    """Workers of this shape that a cluster has room for, which may have shrunk since the shape was made."""
    by_cpu = int((cluster_cpus + SLACK) / shape.num_cpus) if shape.num_cpus else shape.num_workers
    by_gpu = int((cluster_gpus + SLACK) / shape.num_gpus) if shape.num_gpus else by_cpu
    return min(by_cpu, by_gpu)


def object_store_bytes(free_bytes: int) -> int:
    """Ray's shared memory on a node: an eighth of the free memory, at most 64 GiB, no less than Ray accepts.

    Pages are taken when they are written. Sums of two blocks may wait in it, and those of one block of a 70B model are
    5.4 GB from every worker; what does not fit Ray writes to disk.
    """
    return max(min(free_bytes // 8, 64 << 30), 128 << 20)
