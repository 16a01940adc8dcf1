"""Block inputs kept between the two sweeps: in memory while they fit, else in files on local disk."""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from lrpq.model.host_copies import Fetched, HostCopies
from lrpq.model.spill import UNDER_WAY, Key, Spill

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_AHEAD = 2
"""Tensors on their way back to a GPU at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where a tensor came from."""

    device: torch.device
    shape: torch.Size
    dtype: torch.dtype
    size: int
    """Bytes."""
    held_bytes: int
    """In host memory; 0 of one that is spilled."""


class KeptInputs:
    """Tensors by key, each taken once. Those beyond ``memory_bytes`` are spilled to a folder of its own.

    Kept in host memory whatever device they come from, and given back on that device; a GPU goes on while they are
    copied from it and written, and while they come back to it where ``expect`` says which come next. A few that are
    being written are in host memory as well. What a killed process left on disk is removed by the next one that spills
    there.

    Args:
        memory_bytes: how much stays in host memory.
        folder: where the spill folder is made; the system's temporary folder by default.
        may_forget: a tensor for which there is no room, neither in memory nor on disk, is not kept and can be computed
            again; otherwise that is an OSError, of whatever is called next or asks for it.
    """

    def __init__(self, *, memory_bytes: int, folder: Path | None = None, may_forget: bool = False) -> None:
        self.memory_bytes = memory_bytes
        self.held_bytes = 0
        self._spilled_bytes = 0
        self._forgotten_bytes = 0
        self.may_forget = may_forget
        self._parent = folder
        self._held: dict[Key, Tensor | Future[Tensor]] = {}
        self._places: dict[Key, _Place] = {}
        self._expected: deque[Key] = deque()
        self._fetched: dict[Key, Future[Fetched]] = {}
        """On their way back to the GPU, ``_AHEAD`` at most."""
        self._spill: Spill | None = None
        self._own_copies: HostCopies | None = None

    def _copies(self, device: torch.device) -> HostCopies:
        if self._own_copies is None:
            self._own_copies = HostCopies(device)
        return self._own_copies

    @property
    def folder(self) -> Path:
        """Where the spill folder is made."""
        return Path(tempfile.gettempdir()) if self._parent is None else self._parent

    def __contains__(self, key: Key) -> bool:
        self._settle(key)
        return key in self._places

    @property
    def count(self) -> int:
        """Tensors that have not been taken."""
        self._settle_all()
        return len(self._places)

    @property
    def spilled_bytes(self) -> int:
        """What was written to disk."""
        self._settle_all()
        return self._spilled_bytes

    @property
    def forgotten_bytes(self) -> int:
        """What was not kept for want of room."""
        self._settle_all()
        return self._forgotten_bytes

    def put(self, key: Key, tensor: Tensor) -> None:
        """Keep a tensor; it must not be changed afterwards. Those of a GPU are all of the same one.

        Raises:
            OSError: there is no room for it, and nothing may be forgotten.
        """
        size = tensor.numel() * tensor.element_size()
        is_held = self.held_bytes + size <= self.memory_bytes
        if not is_held:
            self._make_way()
        place = _Place(
            device=tensor.device, shape=tensor.shape, dtype=tensor.dtype, size=size, held_bytes=size if is_held else 0
        )
        if is_held:
            self._held[key] = self._copies(tensor.device).start(tensor) if _is_gpu(tensor.device) else tensor.cpu()
            self.held_bytes += size
            self._places[key] = place
        else:
            self._start_write(key, tensor, place)

    def _make_way(self) -> None:
        """Wait for earlier writes, so that no more than ``UNDER_WAY`` are."""
        if self._spill is None:
            return
        for earlier in self._spill.under_way():
            if self._spill.is_done(earlier) or len(self._spill.under_way()) >= UNDER_WAY:
                self._settle(earlier)

    def _start_write(self, key: Key, tensor: Tensor, place: _Place) -> None:
        try:
            if self._spill is None:
                self._spill = Spill(self.folder)
        except OSError:
            if not self.may_forget:
                raise
            self._forgotten_bytes += place.size
            return
        host = self._copies(tensor.device).start(tensor).result if _is_gpu(tensor.device) else lambda: tensor
        self._places[key] = place
        self._spill.start(key, host)

    def _settle(self, key: Key) -> None:
        """Wait for the write of a tensor, where it is being written."""
        if self._spill is None or key not in self._spill.under_way():
            return
        try:
            self._spill.finish(key)
        except BaseException as error:
            size = self._places.pop(key).size
            if not (self.may_forget and isinstance(error, OSError)):
                raise
            self._forgotten_bytes += size
        else:
            self._spilled_bytes += self._places[key].size

    def _settle_all(self) -> None:
        for key in () if self._spill is None else self._spill.under_way():
            self._settle(key)

    def expect(self, keys: Iterable[Key]) -> None:
        """Say which tensors are taken next, in their order; those of a GPU come back to it beside what it computes."""
        self._expected = deque(key for key in keys if key in self)
        self._look_ahead()

    def take(self, key: Key) -> Tensor:
        """Return a tensor and forget it."""
        self._settle(key)
        place = self._places[key]
        if _is_gpu(place.device):
            fetched = self._fetched.pop(key, None) or self._fetch(key)
            tensor = self._copies(place.device).arrived(fetched)
            del self._places[key]
            self.held_bytes -= place.held_bytes
            if self._expected and self._expected[0] == key:
                self._expected.popleft()
            self._look_ahead()
            return tensor
        del self._places[key]
        self.held_bytes -= place.held_bytes
        return self._on_host(key)()

    def _look_ahead(self) -> None:
        for key in islice(self._expected, _AHEAD):
            if key not in self._fetched and key in self and _is_gpu(self._places[key].device):
                self._fetched[key] = self._fetch(key)

    def _fetch(self, key: Key) -> Future[Fetched]:
        place = self._places[key]
        return self._copies(place.device).fetch(self._on_host(key), shape=place.shape, dtype=place.dtype)

    def _on_host(self, key: Key) -> Callable[[], Tensor]:
        """What gives a tensor, which is not kept any more then, in host memory."""
        if key in self._held:
            held = self._held.pop(key)
            return held.result if isinstance(held, Future) else lambda: held
        spill = self._spill
        assert spill is not None
        return lambda: spill.read(key)

    def forget_before(self, first: int) -> None:
        """Make room: forget the tensors of all blocks before this one."""
        self._settle_all()
        for key in [key for key in self._places if key[0] < first]:
            if key in self._fetched:  # its memory may be given up when it has arrived
                self._copies(self._places[key].device).arrived(self._fetched.pop(key))
            elif key in self._held:
                held = self._held.pop(key)
                if isinstance(held, Future):
                    held.result()
            elif self._spill is not None:
                self._spill.remove(key)
            self.held_bytes -= self._places.pop(key).held_bytes

    def close(self) -> None:
        """Forget everything and remove the spill folder."""
        copies, self._own_copies = self._own_copies, None
        try:
            if copies is not None:
                copies.close()
        finally:
            self._held.clear()
            self._places.clear()
            self._expected.clear()
            self._fetched.clear()
            self.held_bytes = 0
            if self._spill is not None:
                self._spill.close()
                self._spill = None

    def __enter__(self) -> KeptInputs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"
