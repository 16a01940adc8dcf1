"""Giving freed memory back to the system."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from functools import cache
from typing import Any, Final

ALLOCATOR: Final[Mapping[str, str]] = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 20),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""Environment with which a process that holds tensors should start; glibc alone reads it, once.

Tensors from 4 MiB on have pages of their own and go back whole when they are freed. Without the first line that
threshold moves up to the largest tensor freed so far, as far as 32 MiB; what is below it lies in the heap, between
small objects that live on, and peaks grow with the number of blocks. The second line asks for huge pages: fresh memory
then costs a fraction of the page faults (docs/log.md, 2026-11-26, has the sweep and what it costs).
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
