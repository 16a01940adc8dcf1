"""What a worker takes when it has worked and holds nothing: libraries, their scratch memory, what allocators keep."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

import tasks.assemble
import tasks.candidates
import tasks.evaluate
import tasks.profile
import tasks.refine  # noqa: F401 -- as a worker does
from lrpq.model.host_memory import release_freed_memory
from lrpq.plan.machine import exercise
from tasks.opening import open_pool
from tasks.store.local import LocalStore
from tasks.store.tensors import read_symmetric, read_tensors, write_symmetric, write_tensors
from tasks.worker import WorkerState

WIDTH = 2048


def idle_bytes(threads: int) -> int:
    """Resident memory, shared memory left out, of a real Ray worker after a little of everything."""
    with open_pool(device="cpu", workers=1, threads=threads) as pool:
        return int(pool.each(after_work)[0])


def after_work(state: WorkerState) -> int:
    """Do a little of everything, let go of it, and say what is left (bytes)."""
    exercise(state.device)
    matrix = {"H": torch.randn(WIDTH, WIDTH)}
    with tempfile.TemporaryDirectory(prefix="lrpq-idle-") as folder:
        store = LocalStore.open_tested(Path(folder), url=folder)
        for index in range(2):
            write_symmetric(store, f"matrix-{index}", matrix)
            read_symmetric(store, f"matrix-{index}", "H")
        write_tensors(store, "codes", {"codes": torch.zeros(WIDTH * WIDTH, dtype=torch.int32)})
        read_tensors(store, "codes")
    del matrix
    release_freed_memory()
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss")}
    return found["RssAnon"] + found["RssFile"]
