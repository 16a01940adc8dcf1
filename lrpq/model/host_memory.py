"""Giving freed memory back to the system."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from functools import cache
from typing import Any, Final

ALLOCATOR: Final[Mapping[str, str]] = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
"""Environment that a process which holds tensors is to start with: read once, by the C library, and only glibc's does.

Tensors from 1 MiB on then have pages of their own and go back whole when they are freed. Without it the threshold grows
to the largest tensor freed so far, up to 32 MiB, all below it lie in the heap, and what of the heap is free between
tensors that live on grows with the number of blocks (COST).
"""


@cache
def _trim() -> Any:
    """The C library's malloc_trim, or None where there is none (it is glibc's)."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def release_freed_memory() -> None:
    """Return freed heap pages to the system.

    glibc keeps freed tensors of up to 32 MB in its heap, between smaller ones that live on; over many blocks the
    resident memory then grows although nothing is held. A trim a block costs milliseconds and keeps it flat
    (benchmarks/depth.py).
    """
    trim = _trim()
    if trim is not None:
        trim(0)
