"""Tensors of a GPU brought to host memory and back, and added up there, by the threads that move bytes.

Most of a copy to fresh memory is the first touch of its pages, which several threads do faster than one; the sums of
one block of a 70B model are 5 GB. On one thread, and of small tensors, these are PyTorch's copies.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from functools import cache, partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from lrpq.model.file_reads import FileReads
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.staging import BUFFER_BYTES, Event, Staging
from tasks.store.host_threads import begun, host_threads, in_order, made

Key = TypeVar("Key", bound=Hashable)

SMALL_BYTES = 8 << 20
"""Up to which one copy is fast enough."""


def to_host(tensor: Tensor, after: Event | None = None) -> Tensor:
    """The tensor in host memory: itself if it is there.

    Args:
        tensor: contiguous, where ``after`` is given; it must not be changed before this returns.
        after: event with which it is whole (``now``), where another thread asks for more meanwhile. By default it is
            whole when the device has done all that the calling thread's stream was given.
    """
    if tensor.device.type == "cpu":
        return tensor
    if tensor.nbytes <= SMALL_BYTES or host_threads() == 1:
        return tensor.cpu() if after is None else _staging(tensor.device).to_host(tensor, after)
    return copied_to_host(tensor, _staging(tensor.device), after=after)


def now(device: torch.device | str) -> Event:
    """Happens when a GPU has done what the calling thread's stream was given so far."""
    return _staging(_numbered(torch.device(device))).now()


def to_host_beside(tensors: Mapping[Key, Tensor]) -> Future[dict[Key, Tensor]]:
    """Start to bring tensors of one device to host memory, beside what the caller goes on to ask of the device; of a
    CPU they are there. They must not be changed any more."""
    for tensor in tensors.values():
        if tensor.device.type != "cpu":
            return copied_beside(tensors, _staging(tensor.device))
    return made(dict(tensors))


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on a device: itself if it is there."""
    device = torch.device(device)
    if device.type == "cpu" or tensor.device.type != "cpu" or tensor.nbytes <= SMALL_BYTES or host_threads() == 1:
        return tensor.to(device)
    return copied_to_device(tensor, _staging(_numbered(device)))


def read_to_device(source: ModelSource, names: Sequence[str], device: torch.device | str) -> Tensor:
    """Tensors of a model whose rows, one after the other, make one: as they are stored, on a device."""
    device = torch.device(device)
    same = source.reads_files and len({source.dtype(name) for name in names}) == 1
    if device.type == "cpu" or not same or host_threads() == 1:
        return to_device(source.read_rows(names), device)
    staging = _staging(_numbered(device))
    tensors, arrived = FileReads(source=source, staging=staging, threads=host_threads()).bring({names[0]: names})
    staging.wait(arrived)
    return tensors[names[0]]


def copied_to_host(
    tensor: Tensor, staging: Staging, *, piece_bytes: int = BUFFER_BYTES, after: Event | None = None
) -> Tensor:
    """A copy in host memory, made in pieces by all threads."""
    if after is not None and not tensor.is_contiguous():
        raise ValueError(
            f"a copy of what is whole by then of a tensor with strides {tensor.stride()}: make it contiguous"
        )
    source = tensor.detach().contiguous()
    flat = source.view(-1).view(torch.uint8)
    memory = np.empty(max(1, len(flat)), dtype=np.uint8)  # of an empty array torch knows no stride
    after = staging.now() if after is None else after
    _all(
        partial(staging.to_host, flat[piece], after, memory=memory[piece]) for piece in _pieces(len(flat), piece_bytes)
    )
    return torch.from_numpy(memory)[: len(flat)].view(tensor.dtype).view(tensor.shape)


def copied_beside(tensors: Mapping[Key, Tensor], staging: Staging) -> Future[dict[Key, Tensor]]:
    """Copies in host memory, made by a thread of their own and those that move bytes, in the order of the tensors.

    Each tensor is held until its copy is made, and no longer.
    """
    keys, left = list(tensors), deque(tensor.detach().contiguous() for tensor in tensors.values())
    after = staging.now()  # when they are contiguous too

    def copy() -> dict[Key, Tensor]:
        with closing(in_order(partial(staging.to_host, left.popleft(), after) for _ in keys)) as found:
            return dict(zip(keys, found, strict=True))

    (coming,) = begun([copy])
    return coming


def copied_to_device(tensor: Tensor, staging: Staging, *, piece_bytes: int = BUFFER_BYTES) -> Tensor:
    """A copy on the device of ``staging``, made in pieces by all threads; later operations of the caller's find it."""
    source = tensor.detach().contiguous()
    flat = source.view(-1).view(torch.uint8)
    found = torch.empty(source.shape, dtype=source.dtype, device=staging.device)
    into = found.view(-1).view(torch.uint8)
    after = staging.now()
    _all(partial(staging.to_device, flat[p], into[p], after) for p in _pieces(len(flat), piece_bytes))
    staging.finish()
    return found


def added(left: Tensor, right: Tensor, *, piece_bytes: int = BUFFER_BYTES) -> Tensor:
    """``left + right`` of two tensors in new memory; bits are PyTorch's: IEEE 754 leaves an addition no choice."""
    same = left.shape == right.shape and left.dtype == right.dtype and left.device == right.device
    in_pieces = same and left.device.type == "cpu" and left.dtype in (torch.float32, torch.float64)
    if not in_pieces or left.nbytes <= piece_bytes or host_threads() == 1:
        return left + right
    a, b = left.contiguous().view(-1), right.contiguous().view(-1)
    total = torch.from_numpy(np.empty(left.numel(), dtype=str(left.dtype).removeprefix("torch.")))
    step = piece_bytes // left.element_size()
    _all(partial(torch.add, a[piece], b[piece], out=total[piece]) for piece in _pieces(left.numel(), step))
    return total.view(left.shape)


def _all(calls: Iterator[Callable[[], Any]]) -> None:
    with closing(in_order(calls)) as results:
        for _ in results:
            pass


def _pieces(size: int, step: int) -> Iterator[slice]:
    return (slice(start, min(size, start + step)) for start in range(0, size, step))


def _numbered(device: torch.device) -> torch.device:
    return torch.device(device.type, torch.cuda.current_device()) if device.index is None else device


@cache
def _staging(device: torch.device) -> Staging:
    """Page-locked buffers of this process, 256 MB a device, made when they are first needed."""
    return Staging(device)
