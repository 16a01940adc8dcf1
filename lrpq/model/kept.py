"""Block inputs kept between the two sweeps: in memory while they fit, else in files on local disk."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Key = tuple[int, ...]


class KeptInputs:
    """Tensors by key, each taken once. Those beyond ``memory_bytes`` are spilled to a folder of its own.

    Kept in host memory whatever device they come from, and given back on that device.

    Args:
        memory_bytes: how much stays in host memory.
        folder: where the spill folder is made; the system's temporary folder by default.
    """

    def __init__(self, *, memory_bytes: int, folder: Path | None = None) -> None:
        self.memory_bytes = memory_bytes
        self.held_bytes = 0
        self.spilled_bytes = 0
        self._parent = folder
        self._held: dict[Key, Tensor] = {}
        self._devices: dict[Key, torch.device] = {}
        self._spill: tempfile.TemporaryDirectory[str] | None = None

    def put(self, key: Key, tensor: Tensor) -> None:
        """Keep a tensor; it must not be changed afterwards."""
        self._devices[key] = tensor.device
        tensor = tensor.cpu()
        size = tensor.numel() * tensor.element_size()
        if self.held_bytes + size <= self.memory_bytes:
            self._held[key] = tensor
            self.held_bytes += size
            return
        if self._spill is None:
            self._spill = tempfile.TemporaryDirectory(prefix="lrpq-kept-", dir=self._parent)
        save_file({"x": tensor.contiguous()}, self._path(key))
        self.spilled_bytes += size

    def take(self, key: Key) -> Tensor:
        """Return a tensor and forget it."""
        device = self._devices.pop(key)
        if key in self._held:
            tensor = self._held.pop(key)
            self.held_bytes -= tensor.numel() * tensor.element_size()
            return tensor.to(device)
        path = self._path(key)
        spilled: Tensor = load_file(path)["x"].clone()
        path.unlink()
        return spilled.to(device)

    def close(self) -> None:
        """Forget everything and remove the spill folder."""
        self._held.clear()
        self._devices.clear()
        self.held_bytes = 0
        if self._spill is not None:
            self._spill.cleanup()
            self._spill = None

    def __enter__(self) -> KeptInputs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _path(self, key: Key) -> Path:
        if self._spill is None:
            raise KeyError(key)
        return Path(self._spill.name) / ("-".join(map(str, key)) + ".safetensors")
