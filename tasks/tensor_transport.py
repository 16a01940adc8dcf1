"""Tensors between workers without a copy on either side but the one into Ray's shared memory.

By default Ray pickles a tensor by ``torch.save`` into a string, which is copied again into the object store and copied
out of it by whoever reads: for 256 MB 1.0 s and 0.6 s on one core, where this takes 0.3 s and nothing (docs/log.md).
The sums of one block of a 70B model are 5 GB from every worker.

A tensor of a GPU arrives in host memory. What arrives is shared by all readers on a node and may not be written to: the
system ends a process that does.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import ray
import torch
from torch import Tensor

from tasks.device_copies import to_host

if TYPE_CHECKING:
    from numpy.typing import NDArray

Parts = tuple["NDArray[Any]", str, tuple[int, ...]]
"""Bytes, name of the dtype, shape."""


def send_tensors_by_buffer() -> None:
    """From now on this process, a worker, sends its tensors so; processes that receive them need no preparation."""
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    ray.util.register_serializer(Tensor, serializer=sent, deserializer=received)


def sent(tensor: Tensor) -> Parts:
    """What goes into the object store: a view of a contiguous tensor in host memory, a copy of any other."""
    values = to_host(tensor.detach()).contiguous()
    dtype = str(values.dtype).removeprefix("torch.")
    return values.reshape(-1).view(torch.uint8).numpy(), dtype, tuple(values.shape)


def received(parts: Parts) -> Tensor:
    """The tensor in host memory, not to be written to."""
    values, dtype, shape = parts
    return torch.from_numpy(values).view(getattr(torch, dtype)).reshape(shape)
