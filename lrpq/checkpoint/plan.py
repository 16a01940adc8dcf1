"""What a checkpoint will hold and how large it will be, to the byte, before any weight is read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lrpq.checkpoint.activations import INPUT_SCALE, ZERO_POINT, StoredActivations, input_tensors
from lrpq.checkpoint.formats import FORMATS, NOT_COUNTED, CheckpointFormat
from lrpq.checkpoint.layout import Shard, StoredTensor, plan_shards
from lrpq.checkpoint.modules import WEIGHT, QuantizedModule, quantized_modules
from lrpq.checkpoint.patterns import natural_key
from lrpq.errors import ConfigError
from lrpq.model.layers import Choice, LinearSpec
from lrpq.model.safetensors_source import ModelSource
from lrpq.notation import BITS_PER_BYTE

MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSize:
    """Size of a checkpoint's weight files (``*.safetensors``), headers included, and of its table of activations."""

    total_bytes: int
    quantized_bits: int
    """Packed codes and scales of the quantized modules (GPTQ: zeros and orders too): what a budget in bits per weight
    counts."""
    num_quantized_weights: int
    metadata_bits: int
    """Stored shapes of the quantized modules, 128 bits each: in the file, not in the budget per weight."""
    activation_bits: int = 0
    """Grids of activations: their tensors and their table."""

    @property
    def fixed_bytes(self) -> int:
        """Everything but the codes and scales of the quantized modules and the grids of activations.

        Headers hold offsets in decimal digits, so another choice of bits for the same modules moves this by a
        few bytes a tensor: plan the final choices again before comparing them with a limit in bytes.
        """
        return self.total_bytes - (self.quantized_bits + self.activation_bits) // BITS_PER_BYTE

    @property
    def average_bits(self) -> float:
        """Bits per quantized weight, all in: codes and scales, and the grids of activations."""
        return (self.quantized_bits + self.activation_bits) / self.num_quantized_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointPlan:
    """The files of a checkpoint and which of their tensors belong to quantized modules."""

    shards: tuple[Shard, ...]
    copied: tuple[str, ...]
    """Tensors taken over from the source as they are."""
    modules: Mapping[str, QuantizedModule]
    """First tensor of a quantized module's unit -> the module."""
    size: CheckpointSize


def planned_size(
    source: ModelSource,
    choices: Mapping[str, Choice],
    *,
    specs: Sequence[LinearSpec] = (),
    format: CheckpointFormat = CheckpointFormat.COMPRESSED_TENSORS,
    activations: StoredActivations | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> CheckpointSize:
    """Size that ``write_checkpoint`` will reach for these choices, to the byte; reads no weights.

    Raises:
        ConfigError: nothing is quantized, or a choice does not fit its module.
        ModelError: a module to quantize is not a matrix of the source.
    """
    return plan_checkpoint(
        source, choices, specs=specs, format=format, activations=activations, max_shard_bytes=max_shard_bytes
    ).size


def plan_checkpoint(
    source: ModelSource,
    choices: Mapping[str, Choice],
    *,
    specs: Sequence[LinearSpec] = (),
    format: CheckpointFormat = CheckpointFormat.COMPRESSED_TENSORS,
    activations: StoredActivations | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> CheckpointPlan:
    """Lay out all files, tensors in the natural order of their names whatever the source's order or sharding.

    Args:
        source: the original.
        choices: module name -> bits and group size.
        specs: the model's linear layers, which say how a module lies on disk; one that has none is
            ``name + '.weight'`` there.
        format: what quantized modules are stored as.
        activations: grids to store beside the weights.
        max_shard_bytes: bytes of tensors in a file; a larger module has a file of its own.

    Raises:
        ConfigError: nothing is quantized, or a choice does not fit its module.
        ModelError: a module to quantize is not a matrix of the source.
    """
    if max_shard_bytes < 1:
        raise ConfigError(f"max_shard_bytes is {max_shard_bytes}; expected a positive number of bytes")
    quantized = quantized_modules(source, choices, specs)
    inputs = activations.inputs if activations is not None else {}
    table = activations.text if activations is not None else ""
    owner = {original.name: module for module in quantized.values() for original in module.originals}
    units: list[tuple[StoredTensor, ...]] = []
    copied: list[str] = []
    modules: dict[str, QuantizedModule] = {}
    planned: set[str] = set()
    for name in sorted(source.names(), key=natural_key):
        module = owner.get(name)
        if module is None:
            copied.append(name)
            units.append((StoredTensor(name=name, dtype=source.dtype(name), shape=tuple(source.shape(name))),))
        elif module.name not in planned:  # its tensors are made together, from one module's codes
            planned.add(module.name)
            store = FORMATS[format].stored
            units.append(tuple(t for original in module.originals for t in store(original, module.choice)))
            if module.name in inputs:
                stems = [original.name.removesuffix(WEIGHT) for original in module.originals]
                units[-1] += tuple(t for stem in stems for t in input_tensors(stem))
            modules[units[-1][0].name] = module
    shards = plan_shards(units, max_shard_bytes=max_shard_bytes)
    made = [tensor for unit in units if unit[0].name in modules for tensor in unit]
    uncounted = sum(tensor.nbytes for tensor in made if tensor.name.endswith(NOT_COUNTED))
    of_inputs = sum(tensor.nbytes for tensor in made if tensor.name.endswith((f".{INPUT_SCALE}", f".{ZERO_POINT}")))
    table_bytes = len(table.encode())
    size = CheckpointSize(
        total_bytes=sum(shard.nbytes for shard in shards) + table_bytes,
        quantized_bits=BITS_PER_BYTE * (sum(tensor.nbytes for tensor in made) - uncounted - of_inputs),
        num_quantized_weights=sum(math.prod(module.shape) for module in quantized.values()),
        metadata_bits=BITS_PER_BYTE * uncounted,
        activation_bits=BITS_PER_BYTE * (of_inputs + table_bytes),
    )
    return CheckpointPlan(shards=shards, copied=tuple(copied), modules=modules, size=size)
