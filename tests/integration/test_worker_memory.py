"""A worker's freed tensors go back to the system, whatever lives on between them."""

import sys

import pytest
from pipeline_case import start_pool

from lrpq.model.host_memory import ALLOCATOR
from tasks.cluster import WorkerState


@pytest.mark.skipif(sys.platform != "linux", reason="the settings are glibc's")
def test_what_lies_between_freed_tensors_holds_no_memory(request: pytest.FixtureRequest) -> None:
    """With glibc's own moving threshold the tensors here would lie in the heap, and stay resident."""

    def resident_mb_before_and_after(state: WorkerState) -> tuple[dict[str, str], float, float, float]:
        from pathlib import Path

        import torch

        def resident_mb() -> float:
            lines = Path("/proc/self/status").read_text().splitlines()
            return int(next(line for line in lines if line.startswith("VmRSS:")).split()[1]) / 1024

        settings = dict(entry.split("=", 1) for entry in Path("/proc/self/environ").read_text().split("\0") if entry)
        del_me = torch.ones(6 << 20)  # 24 MiB: freeing it would move the threshold above all that follows
        del del_me
        before = resident_mb()
        large, small = [], []
        for _ in range(16):
            large.append(torch.ones(5 << 18))  # 5 MiB
            small.append(torch.ones(1 << 10))  # 4 KiB, kept
        between = resident_mb()
        large.clear()
        return settings, before, between, resident_mb()

    pool = start_pool(request)
    for settings, before, between, after in pool.each(resident_mb_before_and_after):
        assert ALLOCATOR.items() <= settings.items()
        assert between - before > 70
        assert after - before < 10
