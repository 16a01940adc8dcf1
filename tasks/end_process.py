"""Ending a worker's process on whatever machine it is.

``ray.kill`` asks the process to end; one that is stopped (SIGSTOP, a debugger) never reads the request. Ray then calls
it dead and gives its cores away, while it keeps its memory.
"""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

REMOTE_SECONDS = 10.0


def end_process(node: str, pid: int) -> None:
    """End a process of Ray's on one of the cluster's machines; nothing happens if it, or the machine, is gone."""
    if node == ray.get_runtime_context().get_node_id():
        kill_worker(pid)
        return
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    task = ray.remote(kill_worker).options(num_cpus=0, scheduling_strategy=strategy, max_retries=0)
    with contextlib.suppress(ray.exceptions.RayError):
        ray.get(task.remote(pid), timeout=REMOTE_SECONDS)


def kill_worker(pid: int) -> None:
    """SIGKILL, if the process is a Ray worker: its number may have passed to another program."""
    try:
        name = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return
    if name.startswith(b"ray::"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
