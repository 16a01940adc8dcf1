"""Tensors that a checkpoint takes over from the original bit for bit, whatever their type.

`ModelSource` reads what can be quantized: floating-point tensors. Old checkpoints also store masks and position ids as
integers or booleans; those are read here, straight from the files.
"""

from __future__ import annotations

import json

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lrpq.checkpoint.layout import DTYPE_NAMES, INDEX_FILE, StoredTensor
from lrpq.errors import ModelError
from lrpq.model.safetensors_source import READABLE, ModelSource

WHOLE_NUMBERS = {
    name: dtype for dtype, name in DTYPE_NAMES.items() if not dtype.is_floating_point and name not in READABLE
}


class CarriedTensors:
    """Types and values of a source's tensors, integers and booleans included."""

    def __init__(self, source: ModelSource) -> None:
        self._source = source
        self._whole: dict[str, torch.dtype] | None = None
        self._files: dict[str, str] = {}

    def stored(self, name: str) -> StoredTensor:
        """Name, type and shape of a tensor, from the header.

        Raises:
            ModelError: its type has no place in a checkpoint.
        """
        return StoredTensor(name=name, dtype=self._dtype(name), shape=tuple(self._source.shape(name)))

    def read(self, name: str) -> Tensor:
        """One tensor in its stored type, on the CPU."""
        if self._dtype(name).is_floating_point:
            return self._source.read(name)
        path = self._source.folder / self._files[name]
        try:
            with safe_open(path, framework="pt", device="cpu") as handle:
                tensor: Tensor = handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"shard {path}: truncated or corrupt ({error}); fetch the file again") from error
        return tensor

    def _dtype(self, name: str) -> torch.dtype:
        return self._whole_numbers().get(name) or self._source.dtype(name)

    def _whole_numbers(self) -> dict[str, torch.dtype]:
        if self._whole is None:
            self._whole = {}
            names = set(self._source.names())
            folder = self._source.folder
            index = folder / INDEX_FILE
            if index.is_file():
                files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            else:
                files = sorted(path.name for path in folder.glob("*.safetensors"))
            for file in files:
                with (folder / file).open("rb") as handle:
                    header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
                for name, entry in header.items():
                    if name in names and entry["dtype"] in WHOLE_NUMBERS:
                        self._whole[name] = WHOLE_NUMBERS[entry["dtype"]]
                        self._files[name] = file
        return self._whole
