"""Time and peak memory of an action on one device."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from lrpq.compare.memory import peak_memory

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured(Generic[T]):
    """One action."""

    seconds: float
    peak_bytes: int
    """Of device memory on a GPU, of the process on a CPU; what was there before counts too."""
    value: T


def synchronize(device: torch.device) -> None:
    """Wait until everything that was launched is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def now(device: torch.device) -> float:
    """Seconds on a clock that stands behind everything launched so far."""
    synchronize(device)
    return time.perf_counter()


def measured(action: Callable[[], T], device: torch.device, *, repeats: int = 1, warm: bool = True) -> Measured[T]:
    """The fastest of some calls, after one that does not count (``warm``): kernels are compiled and libraries loaded
    there."""
    if warm:
        action()
    best = float("inf")
    with peak_memory(str(device)) as peak:
        for _ in range(repeats):
            value: T | None = None  # the former result is gone before the next one is made
            started = now(device)
            value = action()
            best = min(best, now(device) - started)
    assert value is not None
    return Measured(seconds=best, peak_bytes=peak.bytes, value=value)


def release(device: torch.device) -> None:
    """Give freed memory back, so that one part's peak does not depend on the part before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
