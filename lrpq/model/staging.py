"""Copies between a GPU and ordinary host memory through a few page-locked buffers, beside what the GPU computes.

A GPU copies to and from page-locked memory by itself, several times as fast as from ordinary memory, for which the
driver also holds up whoever asks. All of the host's memory cannot be locked, so tensors pass in pieces through a ring
of such buffers: between GPU and buffer on a stream of its own, between buffer and memory by the calling thread, which
meanwhile holds no lock of Python's. Several threads may call at once; then both halves overlap.

On a CPU the same code copies from memory to memory: streams and events are PyTorch's, which do nothing there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

BUFFERS = 8
BUFFER_BYTES = 32 << 20
"""A piece takes .6 ms over PCIe at 55 GB/s: long beside what a launch takes, short beside a micro-batch."""

Event = Any
"""torch.cuda.Event, or torch.cpu.Event, which has the same methods."""


@dataclass(slots=True)
class _Buffer:
    memory: Tensor
    """Bytes, page-locked where there is a GPU."""
    used: Event
    """Until this has happened the GPU reads or writes them."""


class Staging:
    """Buffers and streams for one device; buffers are made when they are first needed.

    Args:
        device: to and from which tensors are copied.
        buffers: at most.
        buffer_bytes: of each.
    """

    def __init__(self, device: torch.device, *, buffers: int = BUFFERS, buffer_bytes: int = BUFFER_BYTES) -> None:
        self.device = device
        self.buffer_bytes = buffer_bytes
        self._module = torch.get_device_module(device)
        self._gpu = device.type == "cuda"
        self._out, self._in = self._stream(), self._stream()
        self._free: SimpleQueue[_Buffer | None] = SimpleQueue()
        for _ in range(buffers):
            self._free.put(None)  # one that is not made yet

    def now(self) -> Event:
        """Happens when the device has done what the calling thread's stream was given so far."""
        event = self._event()
        event.record(self._module.current_stream(self.device))
        return event

    def wait(self, event: Event) -> None:
        """What the calling thread's stream is given from here on is done after the event; nobody waits for it here."""
        event.wait(self._module.current_stream(self.device))

    def to_host(self, tensor: Tensor, after: Event, *, memory: NDArray[np.uint8] | None = None) -> Tensor:
        """A copy in ordinary host memory, when this returns.

        Args:
            tensor: contiguous; it must not be changed, nor its memory be given up, before this returns.
            after: event after which it holds what is to be copied.
            memory: where to, as many bytes; by default new memory.
        """
        source = _bytes(tensor)
        if memory is None:
            # numpy's: in deterministic mode PyTorch would fill it first, and numpy asks for large pages
            memory = np.empty(max(1, len(source)), dtype=np.uint8)  # of an empty array torch knows no stride
        for piece in self._pieces(len(source)):
            with self._buffer() as buffer:
                held = buffer.memory[: piece.stop - piece.start]
                with self._module.stream(self._out):
                    after.wait(self._out)
                    held.copy_(source[piece], non_blocking=True)
                    buffer.used.record(self._out)
                buffer.used.synchronize()
                np.copyto(memory[piece], held.numpy())
        return torch.from_numpy(memory)[: len(source)].view(tensor.dtype).view(tensor.shape)

    def to_device(self, tensor: Tensor, into: Tensor, after: Event) -> Event:
        """Copy a host tensor; returns the event with which the copy is whole.

        Args:
            tensor: contiguous; it is not needed any more when this returns.
            into: of the same shape and dtype, contiguous, on the device. Whoever reads it waits for the event, and so
                does who gives its memory up.
            after: event after which its memory is free.
        """
        memory = _bytes(tensor).numpy()

        def read(start: int, held: NDArray[np.uint8]) -> None:
            np.copyto(held, memory[start : start + len(held)])

        self.fill(into, read, after)
        return self.brought()

    def fill(self, into: Tensor, read: Callable[[int, NDArray[np.uint8]], None], after: Event) -> None:
        """Copy what ``read`` writes into buffers; ``brought`` gives the event with which it is whole.

        Args:
            into: contiguous, on the device.
            read: given the first byte and a buffer for so many from there on, none of which it may leave as it is.
            after: event after which the memory of ``into`` is free.
        """
        target = _bytes(into)
        try:
            for piece in self._pieces(len(target)):
                with self._buffer() as buffer:
                    held = buffer.memory[: piece.stop - piece.start]
                    read(piece.start, held.numpy())
                    with self._module.stream(self._in):
                        after.wait(self._in)
                        target[piece].copy_(held, non_blocking=True)
                        buffer.used.record(self._in)
        except BaseException:
            self.finish()  # then nothing is written there any more
            raise

    def brought(self) -> Event:
        """Happens when all copies to the device are made that have been asked for."""
        done = self._event()
        done.record(self._in)
        return done

    def finish(self) -> None:
        """Wait until the device has made all copies."""
        for stream in (self._out, self._in):
            event = self._event()
            event.record(stream)
            event.synchronize()

    @contextmanager
    def _buffer(self) -> Iterator[_Buffer]:
        """A buffer that the GPU does not use any more; waits for one where all are in use."""
        buffer = self._free.get()
        try:
            if buffer is None:
                with self._module.stream(self._in):  # and so with its device
                    memory = torch.empty(self.buffer_bytes, dtype=torch.uint8, pin_memory=self._gpu)
                buffer = _Buffer(memory=memory, used=self._event())
            buffer.used.synchronize()
            yield buffer
        finally:
            self._free.put(buffer)

    def _pieces(self, size: int) -> Iterator[slice]:
        return (slice(start, min(size, start + self.buffer_bytes)) for start in range(0, size, self.buffer_bytes))

    def _stream(self) -> Any:
        return torch.cuda.Stream(self.device) if self._gpu else torch.cpu.Stream()  # type: ignore[no-untyped-call]

    def _event(self) -> Event:
        """``blocking``: who waits for it on the host sleeps."""
        return torch.cuda.Event(blocking=True) if self._gpu else torch.cpu.Event()  # type: ignore[no-untyped-call]


def _bytes(tensor: Tensor) -> Tensor:
    """A tensor's memory, one after the other."""
    return tensor.view(-1).view(torch.uint8)
