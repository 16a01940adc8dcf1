"""The dense format: dequantized weights in 16 bits under the original's names, read by whatever reads the original.

A bfloat16 or float16 original keeps its type: the values are those that the packed checkpoint loads as. A float32 one
has its quantized modules in bfloat16, every value rounded once; what is not quantized stays float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrpq.checkpoint.compressed_tensors import check_choice
from lrpq.checkpoint.layout import StoredTensor
from lrpq.checkpoint.modules import WEIGHT
from lrpq.model.layers import Choice
from lrpq.quant.grid import QuantizedWeight


def stored_tensors(original: StoredTensor, choice: Choice) -> tuple[StoredTensor, ...]:
    """The original's tensor in 16 bits.

    Raises:
        ConfigError: the choice does not fit the width.
    """
    check_choice(original.name.removesuffix(WEIGHT), choice, original.shape[1])
    return (StoredTensor(name=original.name, dtype=_half(original.dtype), shape=original.shape),)


def dense_tensors(weight: QuantizedWeight, original: StoredTensor) -> dict[str, Tensor]:
    """Dequantized values.

    Raises:
        QuantizationError: a value is beyond float16, where the original is stored in it.
    """
    return {original.name: weight.dequantize(_half(original.dtype), name=original.name)}


def loaded(weight: QuantizedWeight, original: StoredTensor, dtype: torch.dtype) -> Tensor:
    """The stored values in the model's dtype."""
    stored: Tensor = weight.dequantize(_half(original.dtype), name=original.name)
    return stored.to(dtype)


def no_quantization_config(*_: Any, **__: Any) -> None:
    """A dense checkpoint is described as the original is."""


def _half(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.itemsize == torch.bfloat16.itemsize else torch.bfloat16
