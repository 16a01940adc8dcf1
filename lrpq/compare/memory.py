"""Peak memory of a part of a process."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(slots=True)
class Peak:
    """Filled when the part ends."""

    bytes: int = 0


@contextmanager
def peak_memory(device: str) -> Iterator[Peak]:
    """Inside, the peak is that of this part: of device memory on a GPU, of the resident set on Linux.

    Where neither can be reset, it is the peak of the process so far.
    """
    peak = Peak()
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    else:
        _reset_resident()
    yield peak
    peak.bytes = torch.cuda.max_memory_allocated(device) if on_gpu else _resident_peak()


def _reset_resident() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM: proc(5)
    except OSError:
        return


def _resident_peak() -> int:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
