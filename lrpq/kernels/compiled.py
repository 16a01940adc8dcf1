"""How loops for CPUs are compiled, and shared out among the threads that PyTorch may use."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import ParamSpec, TypeVar

import numba
import torch
from torch import Tensor

_P = ParamSpec("_P")
_R = TypeVar("_R")

LANES = 64
"""Rows that go through a loop together, contiguous in memory: a few vector registers of any CPU (16 .. 128 swept)."""


def compiled(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Machine code for the CPU that it runs on, made at the first call and kept beside the source or in the user's
    cache.

    Products and sums may fuse into one rounding; nothing else is reordered, so that results do not depend on the width
    of the CPU's vectors. The interpreter lock is released.
    """
    options = {"nogil": True, "fastmath": {"contract"}, "error_model": "numpy", "boundscheck": False}
    try:
        made: Callable[_P, _R] = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder that it could be kept in: then every process compiles for itself, in seconds
        made = numba.njit(**options)(function)
    return made


def usable(tensor: Tensor) -> bool:
    """Whether compiled loops take this: float32, on a CPU or a CUDA device."""
    return tensor.dtype == torch.float32 and tensor.device.type in ("cpu", "cuda")


def strips(rows: int) -> int:
    """How many strips of ``LANES`` rows there are."""
    return -(-rows // LANES)


def in_threads(work: Callable[[int, int], None], count: int) -> None:
    """``work(begin, end)`` over 0 .. count, cut among the threads that PyTorch is allowed; parts must not interact."""
    num = min(torch.get_num_threads(), count)
    if num <= 1:
        work(0, count)
        return
    edges = [count * i // num for i in range(num + 1)]
    for done in [_executor(num).submit(work, *edge) for edge in pairwise(edges)]:
        done.result()


@cache
def _executor(num: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num, thread_name_prefix="lrpq-kernel")
