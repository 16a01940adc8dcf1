"""A checkpoint with packed weights, read as the model that it computes: dense tensors under the original's names."""

from __future__ import annotations

import math
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from lrpq.checkpoint.activations import INPUT_SCALE, ZERO_POINT
from lrpq.checkpoint.compressed_tensors import PACKED, SCALE, SHAPE
from lrpq.checkpoint.formats import CheckpointFormat
from lrpq.checkpoint.modules import WEIGHT
from lrpq.checkpoint.stored import StoredCheckpoint
from lrpq.errors import CheckpointError
from lrpq.model.safetensors_source import ModelSource, _read_config

_PARTS = tuple(f".{part}" for part in (PACKED, SCALE, SHAPE, INPUT_SCALE, ZERO_POINT))


class PackedSource(ModelSource):
    """Tensors of a compressed-tensors checkpoint as float32, which holds code times scale exactly.

    Raises:
        CheckpointError: the folder is not such a checkpoint, or a file is damaged.
        ModelError: see `ModelSource`.
    """

    as_on_disk: ClassVar[bool] = False

    def __init__(self, folder: Path | str) -> None:
        self.checkpoint = StoredCheckpoint(Path(folder))
        if self.checkpoint.format in (CheckpointFormat.GPTQ, CheckpointFormat.TRELLIS):
            found = self.checkpoint.format.value
            raise CheckpointError(f"{folder}: is a {found} checkpoint; expected one of compressed-tensors")
        super().__init__(folder)
        self._packed = {module + WEIGHT: module for module in self.checkpoint.modules()}
        parts = {module + part for module in self._packed.values() for part in _PARTS}
        self._entries = {name: entry for name, entry in self._entries.items() if name not in parts}
        both = [name for name in self._packed if name in self._entries]
        if both:
            raise CheckpointError(f"tensor {both[0]} in {folder}: is there packed and dense; expected one of the two")

    def _read_config(self) -> PreTrainedConfig:
        config = _read_config(self.folder, quantized=True)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # the model is built dense
        return config

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted([*self._entries, *self._packed])

    def __contains__(self, name: str) -> bool:
        return name in self._entries or name in self._packed

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; of packed weights, the stored one."""
        module = self._packed.get(name)
        return super().shape(name) if module is None else self.checkpoint.packed_shape(module)

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a tensor; packed weights are float32."""
        return torch.float32 if name in self._packed else super().dtype(name)

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor as it is read."""
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    def read(self, name: str) -> Tensor:
        """Read one tensor; see `ModelSource.read` and `StoredCheckpoint.codes`."""
        module = self._packed.get(name)
        if module is None:
            return super().read(name)
        codes = self.checkpoint.codes(module)
        assert codes is not None  # a module of `modules` has some
        values: Tensor = codes.dequantize(torch.float32, name=name)
        return values
