"""Weights from a model's files to a GPU by several threads, through page-locked buffers only.

On one thread the weights of a 70B block, 1.7 GB, take 2.3 s from cached files (docs/log.md): they are read to fresh
memory, whose pages are touched then, and copied out of it again. Here every thread reads a piece of a tensor to where
the GPU fetches it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrpq.model.safetensors_source import ModelSource
from lrpq.model.staging import Event, Staging

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class FileReads:
    """Reads a source's tensors to a device."""

    source: ModelSource
    staging: Staging
    """Of the device."""
    threads: int

    def can_read(self, names: Sequence[str], dtype: torch.dtype) -> bool:
        """Whether the rows of these tensors, one after the other, are in files as they are wanted."""
        return self.source.reads_files and all(self.source.dtype(name) == dtype for name in names)

    def bring(self, wanted: Mapping[str, Sequence[str]]) -> tuple[dict[str, Tensor], Event]:
        """Tensors on their way to the device, and the event with which all are there.

        Args:
            wanted: name -> tensors of the source whose rows make it, as ``can_read`` has found them.

        Raises:
            ModelError: as `ModelSource.read`.
        """
        source, staging = self.source, self.staging
        found: dict[str, Tensor] = {}
        for name, parts in wanted.items():
            shapes = [source.shape(part) for part in parts]
            shape = shapes[0] if len(parts) == 1 else (sum(s[0] for s in shapes), *shapes[0][1:])
            found[name] = torch.empty(shape, dtype=source.dtype(parts[0]), device=staging.device)
        ready = staging.now()  # once for all: what the device is asked to do meanwhile need not be waited for
        try:
            with ThreadPoolExecutor(self.threads, thread_name_prefix="lrpq-weights") as threads:
                calls = [threads.submit(call) for call in self._pieces(found, wanted, ready)]
                try:
                    for call in calls:
                        call.result()
                finally:
                    for call in calls:
                        call.cancel()
        except BaseException:
            staging.finish()  # the memory may only be given up when nothing is written to it any more
            raise
        for parts in wanted.values():
            for part in parts:
                source.pieces_read(part)
        return found, staging.brought()

    def _pieces(
        self, found: Mapping[str, Tensor], wanted: Mapping[str, Sequence[str]], ready: Event
    ) -> Iterator[Callable[[], None]]:
        for name, tensor in found.items():
            memory = tensor.view(-1).view(torch.uint8)
            step = self.staging.buffer_bytes
            first = 0
            for part in wanted[name]:
                size = self.source.nbytes(part)
                for start in range(0, size, step):
                    stop = min(size, start + step)
                    yield partial(self._read, part, start, memory[first + start : first + stop], ready)
                first += size

    def _read(self, part: str, start: int, into: Tensor, ready: Event) -> None:
        def read(offset: int, memory: NDArray[np.uint8]) -> None:
            self.source.read_piece(part, start + offset, memory)

        self.staging.fill(into, read, ready)
