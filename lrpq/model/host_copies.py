"""Tensors of a GPU brought to host memory and back by threads, beside what the GPU goes on to compute.

Most of a copy to the host is the first touch of the memory that it goes to, which several threads do faster than one.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import BoundedSemaphore

import torch
from torch import Tensor

from lrpq.model.staging import Event, Staging

_THREADS = 4
_UNDER_WAY = 6
"""Copies to the host at most: each holds its tensor on the GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """A tensor on its way back."""

    tensor: Tensor
    """On the device; to be read after ``arrived``."""
    arrived: Event


class HostCopies:
    """Starts copies; close it when none is wanted any more.

    Args:
        device: from and to which tensors are copied.
        staging: its buffers; by default some of its own.
    """

    def __init__(self, device: torch.device, *, staging: Staging | None = None) -> None:
        self.device = device
        self._staging = Staging(device) if staging is None else staging
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="lrpq-host-copies")
        self._room = BoundedSemaphore(_UNDER_WAY)

    def start(self, tensor: Tensor) -> Future[Tensor]:
        """To the host: a tensor that must not be changed any more; waits where many copies are under way."""
        tensor = tensor.contiguous()
        self._room.acquire()
        try:
            copy = self._threads.submit(self._staging.to_host, tensor, self._staging.now())
        except BaseException:
            self._room.release()
            raise
        copy.add_done_callback(lambda _: self._room.release())
        return copy

    def fetch(self, host: Callable[[], Tensor], *, shape: torch.Size, dtype: torch.dtype) -> Future[Fetched]:
        """Back to the device, into memory that is taken from it now.

        Args:
            host: called in a thread: gives the contiguous tensor.
            shape: of the tensor.
            dtype: of the tensor.
        """
        into = torch.empty(shape, dtype=dtype, device=self.device)
        return self._threads.submit(self._brought, host, into, self._staging.now())

    def arrived(self, fetched: Future[Fetched]) -> Tensor:
        """The tensor, which the calling thread's stream waits for; of its own, this waits for the host's part."""
        found = fetched.result()
        self._staging.wait(found.arrived)
        return found.tensor

    def _brought(self, host: Callable[[], Tensor], into: Tensor, after: Event) -> Fetched:
        return Fetched(tensor=into, arrived=self._staging.to_device(host(), into, after))

    def close(self) -> None:
        """Wait for the copies that have begun; the others are not made.

        What has been fetched and not been waited for has arrived afterwards: its memory may be given up.
        """
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._staging.finish()
