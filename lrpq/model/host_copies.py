"""Copies of a GPU's tensors in host memory, made beside what the GPU goes on to compute.

Most of such a copy is the first touch of the memory that it goes to, which several threads do faster than one.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from threading import BoundedSemaphore

import torch
from torch import Tensor

_THREADS = 4
_UNDER_WAY = 8
"""Copies at most: each holds its tensor on the GPU."""


class HostCopies:
    """Starts copies; close it when none is wanted any more."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="lrpq-host-copies")
        self._room = BoundedSemaphore(_UNDER_WAY)

    def start(self, tensor: Tensor) -> Future[Tensor]:
        """A tensor of a GPU, which must not be changed any more; waits where many copies are under way."""
        self._room.acquire()
        computed = torch.cuda.Event()  # type: ignore[no-untyped-call]
        computed.record(torch.cuda.current_stream(tensor.device))
        copy = self._threads.submit(_copied, tensor, computed)
        copy.add_done_callback(lambda _: self._room.release())
        return copy

    def close(self) -> None:
        """Wait for the copies that have begun; the others are not made."""
        self._threads.shutdown(wait=True, cancel_futures=True)


def _copied(tensor: Tensor, computed: torch.cuda.Event) -> Tensor:
    with torch.cuda.stream(torch.cuda.Stream(tensor.device)):  # type: ignore[no-untyped-call]
        computed.synchronize()
        return tensor.cpu()
