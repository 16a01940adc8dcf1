"""Which tensors compiled loops take, where they run, and how rows are shared out among PyTorch's threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from lrpq.kernels.loops import LANES

# Columns up to which launches take longer than what one program does alone. Measured on an H100 at 576, 1,024,
# 1,536 and 2,048 columns, one width: a sweep in one launch takes .81, 1.17, 1.4 and 2.2 times what leaves of 256 take
# (descent 1.2 times what blocks take at 576, .8 at six widths, and more above).
_ONE_LAUNCH_COLUMNS = 768
_ONE_LAUNCH_PRODUCTS = 2**35


def usable(tensor: Tensor) -> bool:
    """Whether compiled loops take this: float32, on a CPU or a CUDA device."""
    return tensor.dtype == torch.float32 and tensor.device.type in ("cpu", "cuda")


def on_device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Makes the tensor's GPU the current one, which is where kernels are launched; does nothing for a CPU's."""
    context: AbstractContextManager[None] = torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]
    return context


def in_one_launch(tensor: Tensor, *, columns: int, rows: int) -> bool:
    """Whether all columns of these (stacked) rows go through one kernel, products included, and not leaf by leaf."""
    small = columns <= _ONE_LAUNCH_COLUMNS and columns * columns * rows <= _ONE_LAUNCH_PRODUCTS
    return tensor.is_cuda and small and columns * rows < 2**31


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
    for done in [_executor(torch.get_num_threads()).submit(work, *edge) for edge in pairwise(edges)]:
        done.result()


@cache
def _executor(num: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num, thread_name_prefix="lrpq-kernel")
