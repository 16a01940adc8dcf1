"""Giving freed memory back to the system."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any


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
