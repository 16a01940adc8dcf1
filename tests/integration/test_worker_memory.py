"""A worker on a CPU keeps its pages from one micro-batch to the next, and gives them back when it is told to."""

from __future__ import annotations

import sys

import pytest
from pipeline_case import start_pool

from tasks.cluster import WorkerState

MAX_FAULTS_SHARE = 0.1


@pytest.mark.skipif(sys.platform != "linux", reason="the settings are glibc's")
def test_tensors_of_a_micro_batch_take_the_pages_of_the_one_before(request: pytest.FixtureRequest) -> None:
    """With glibc's own settings each of them has its pages cleared anew."""

    def faults_and_resident_mb(state: WorkerState) -> tuple[int, float, float]:
        import resource
        import threading
        from pathlib import Path

        import torch

        from lrpq.model.host_memory import release_freed_memory

        def resident_mb() -> float:
            lines = Path("/proc/self/status").read_text().splitlines()
            return int(next(line for line in lines if line.startswith("VmRSS:")).split()[1]) / 1024

        def micro_batch() -> None:
            tensors = [torch.ones(10 << 20) for _ in range(2)]  # 40 MiB each
            del tensors

        for thread in threading.enumerate():
            if thread.name == "lrpq-compile":  # takes memory of its own meanwhile
                thread.join()
        faults = []
        for _ in range(6):  # Ray's own threads take memory too, between these
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(5):
                micro_batch()
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        kept = resident_mb()
        release_freed_memory()
        return min(faults), kept, resident_mb()

    pages = 5 * 2 * (40 << 20) / 4096
    for faults, kept, after in start_pool(request).each(faults_and_resident_mb):
        assert faults < MAX_FAULTS_SHARE * pages, (faults, pages)
        assert kept - after > 70, "what is free goes back when it is asked for"
