"""The formats a checkpoint is written in: which tensors hold a module, and how ``config.json`` describes it."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrpq.checkpoint import compressed_tensors, dense, gptq, trellis
from lrpq.checkpoint.layout import StoredTensor
from lrpq.model.layers import Choice, LinearSpec
from lrpq.notation import BITS_PER_BYTE
from lrpq.quant.grid import QuantizedWeight


class CheckpointFormat(enum.Enum):
    """What the weights of quantized modules are stored as; everything else is the original's in every format."""

    COMPRESSED_TENSORS = "compressed-tensors"
    """Packed codes and scales; transformers and vLLM read it. All widths, group sizes and experts."""
    DENSE = "dense"
    """Dequantized weights under the original names: runs wherever the original does, and is as large."""
    GPTQ = "gptq"
    """GPTQ's packed layout: GPTQModel, vLLM and their kernels. 2, 3, 4 and 8 bits."""
    TRELLIS = "trellis"
    """lrpq's own: trellis codes and uniform ones beside them; transformers reads it with lrpq.loading."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFormat:
    """One format's functions."""

    stored: Callable[[StoredTensor, Choice], tuple[StoredTensor, ...]]
    """Tensors that replace an original's weight. Raises ConfigError for a choice the format cannot store."""
    pack: Callable[[QuantizedWeight, StoredTensor], dict[str, Tensor]]
    """Values of those tensors, by name. Raises CheckpointError where the format would lose something."""
    dequantize: Callable[[QuantizedWeight, StoredTensor, torch.dtype], Tensor]
    """The weight that a loader gives a model of a dtype."""
    describe: Callable[..., dict[str, Any] | None]
    """(choices, specs=, ignore=) -> ``quantization_config``; None where there is none."""


FORMATS: Mapping[CheckpointFormat, WeightFormat] = {
    CheckpointFormat.COMPRESSED_TENSORS: WeightFormat(
        stored=compressed_tensors.stored_tensors,
        pack=compressed_tensors.packed_tensors,
        dequantize=compressed_tensors.loaded,
        describe=compressed_tensors.quantization_config,
    ),
    CheckpointFormat.DENSE: WeightFormat(
        stored=dense.stored_tensors,
        pack=dense.dense_tensors,
        dequantize=dense.loaded,
        describe=dense.no_quantization_config,
    ),
    CheckpointFormat.GPTQ: WeightFormat(
        stored=gptq.stored_tensors,
        pack=gptq.packed_tensors,
        dequantize=compressed_tensors.loaded,
        describe=gptq.quantization_config,
    ),
    CheckpointFormat.TRELLIS: WeightFormat(
        stored=trellis.stored_tensors,
        pack=trellis.packed_tensors,
        dequantize=trellis.loaded,
        describe=trellis.quantization_config,
    ),
}
NOT_COUNTED = (f".{compressed_tensors.SHAPE}",)
"""Tensors that a budget in bits per weight does not count: sizes, not codes, scales, zeros or orders."""


def storage_bits(spec: LinearSpec, choice: Choice, format: CheckpointFormat) -> int:
    """Bits that a module takes in a format, as `CheckpointSize.quantized_bits` counts them.

    Raises:
        ConfigError: the format cannot store the choice.
    """
    rows = spec.d_out // len(spec.stored)
    bits = 0
    for name in spec.stored:
        original = StoredTensor(name=name, dtype=torch.bfloat16, shape=(rows, spec.d_in))
        for tensor in FORMATS[format].stored(original, choice):
            bits += 0 if tensor.name.endswith(NOT_COUNTED) else tensor.nbytes * BITS_PER_BYTE
    return bits
