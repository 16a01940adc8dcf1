"""What a checkpoint will hold and how large it will be, to the byte, before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from lrpq.checkpoint.compressed_tensors import PACKED, SCALE, SHAPE, natural_key, stored_tensors
from lrpq.checkpoint.layout import Shard, StoredTensor, plan_shards
from lrpq.errors import ConfigError, ModelError
from lrpq.model.layers import Choice
from lrpq.notation import BITS_PER_BYTE

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MAX_SHARD_BYTES = 5_000_000_000
WEIGHT = ".weight"


class TensorSource(Protocol):
    """The original model, read one tensor at a time."""

    folder: Path
    """Folder of the original's ``config.json`` and tokenizer."""
    config: PreTrainedConfig

    def names(self) -> list[str]:
        """Names of all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a tensor, without reading it."""

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, in its stored dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSize:
    """Size of a checkpoint's weight files (``*.safetensors``), headers included."""

    total_bytes: int
    quantized_bits: int
    """Packed codes and scales of the quantized modules: what a budget in bits per weight counts."""
    num_quantized_weights: int
    metadata_bits: int
    """Stored shapes of the quantized modules, 128 bits each: in the file, not in the budget per weight."""

    @property
    def fixed_bytes(self) -> int:
        """Everything but the codes and scales of the quantized modules.

        Headers hold offsets in decimal digits, so another choice of bits for the same modules moves this by a
        few bytes a tensor: plan the final choices again before comparing them with a limit in bytes.
        """
        return self.total_bytes - self.quantized_bits // BITS_PER_BYTE

    @property
    def average_bits(self) -> float:
        """Bits per quantized weight, all in: codes and scales."""
        return self.quantized_bits / self.num_quantized_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointPlan:
    """The files of a checkpoint and which of their tensors belong to quantized modules."""

    shards: tuple[Shard, ...]
    copied: tuple[str, ...]
    """Tensors taken over from the source as they are."""
    modules: Mapping[str, str]
    """First tensor of a quantized module's unit -> the module."""
    size: CheckpointSize


def planned_size(
    source: TensorSource, choices: Mapping[str, Choice], *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> CheckpointSize:
    """Size that ``write_checkpoint`` will reach for these choices, to the byte; reads no weights.

    Raises:
        ConfigError: nothing is quantized, or a choice does not fit its module.
        ModelError: a module to quantize is not a matrix of the source.
    """
    return plan_checkpoint(source, choices, max_shard_bytes=max_shard_bytes).size


def plan_checkpoint(
    source: TensorSource, choices: Mapping[str, Choice], *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> CheckpointPlan:
    """Lay out all files, tensors in the natural order of their names whatever the source's order or sharding.

    Raises:
        ConfigError: nothing is quantized, or a choice does not fit its module.
        ModelError: a module to quantize is not a matrix of the source.
    """
    if max_shard_bytes < 1:
        raise ConfigError(f"max_shard_bytes is {max_shard_bytes}; expected a positive number of bytes")
    if not choices:
        raise ConfigError("no module is quantized: the checkpoint would equal the original; give at least one choice")
    names = sorted(source.names(), key=natural_key)
    absent = set(choices) - {name.removesuffix(WEIGHT) for name in names if name.endswith(WEIGHT)}
    if absent:
        raise ModelError(f"module {min(absent)}: has no weight in {source.folder}; name modules of this model only")
    units: list[tuple[StoredTensor, ...]] = []
    copied: list[str] = []
    modules: dict[str, str] = {}
    num_weights = 0
    for name in names:
        shape = source.shape(name)
        module = name.removesuffix(WEIGHT)
        if not name.endswith(WEIGHT) or module not in choices:
            copied.append(name)
            units.append((StoredTensor(name=name, dtype=source.dtype(name), shape=tuple(shape)),))
            continue
        if len(shape) != 2:
            raise ModelError(f"module {module}: its weight has shape {list(shape)}; expected a matrix")
        units.append(stored_tensors(module, d_out=shape[0], d_in=shape[1], choice=choices[module]))
        modules[units[-1][0].name] = module
        num_weights += shape[0] * shape[1]
    shards = plan_shards(units, max_shard_bytes=max_shard_bytes)

    def bits(*kinds: str) -> int:
        wanted = {f"{module}.{kind}" for module in choices for kind in kinds}
        return BITS_PER_BYTE * sum(t.nbytes for unit in units for t in unit if t.name in wanted)

    size = CheckpointSize(
        total_bytes=sum(shard.nbytes for shard in shards),
        quantized_bits=bits(PACKED, SCALE),
        num_quantized_weights=num_weights,
        metadata_bits=bits(SHAPE),
    )
    return CheckpointPlan(shards=shards, copied=tuple(copied), modules=modules, size=size)
