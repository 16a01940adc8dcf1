"""Activation grids in a checkpoint: in compressed-tensors' form where it has one, the rest in a table of ours.

A packed layer ``m`` whose inputs have one uniform grid with a whole zero point, s (q - z), has beside its codes

    m.input_scale        float32 [1]   s
    m.input_zero_point   int8 [1]      z - 2^(bits-1): compressed-tensors counts codes from -2^(bits-1)

and the width under ``input_activations`` of its group in ``config.json``. What that form cannot say is in
``activations.json``: real offsets (shifted grids), logarithmic grids, the points of attention, which no linear layer
reads, and inputs of layers whose weights are dense. Nothing is in both.

    {"version": 1, "blocks": [{PLACE: GRID, ..}, ..]}   an input site or a point of attention; a mapping a block
    GRID   {"type": "uniform", "bits": b, "scale": s, "offset": o}                        s q + o
           {"type": "logarithmic", "bits": b, "scale": s, "steps_per_octave": m}          s 2^(-q/m), last code 0

Numbers are float32 ones, written so that they are read back exactly. ``config.json`` has the table's digest under
``lrpq``: a lost or a changed table is an error, not a model that computes something else.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrpq.activations.grids import MAX_BITS, ActivationGrid, LogarithmicGrid, UniformGrid
from lrpq.checkpoint.layout import StoredTensor
from lrpq.errors import CheckpointError
from lrpq.model.layers import LinearSpec
from lrpq.notation import BITS_PER_BYTE

TABLE = "activations.json"
VERSION = 1
SECTION = "lrpq"
"""Key of ``config.json``."""
INPUT_SCALE, ZERO_POINT = "input_scale", "input_zero_point"
MIN_BITS = 2
BlockGrids = Mapping[str, ActivationGrid]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredActivations:
    """The grids of a model, by where they are stored."""

    inputs: Mapping[str, UniformGrid]
    """Module name -> grid of its inputs, in compressed-tensors' form."""
    table: tuple[BlockGrids, ...]
    """By block: the places of ``activations.json``."""

    @property
    def text(self) -> str:
        """Contents of ``activations.json``."""
        blocks = [{place: grid_document(grid) for place, grid in grids.items()} for grids in self.table]
        return json.dumps({"version": VERSION, "blocks": blocks}, allow_nan=False) + "\n"

    @property
    def section(self) -> dict[str, Any]:
        """What ``config.json`` says of the table."""
        return {"activations": {"version": VERSION, "sha256": digest(self.text.encode())}}

    @property
    def bits(self) -> int:
        """What the grids take: their tensors, and the table."""
        tensors = sum(tensor.nbytes for module in self.inputs for tensor in input_tensors(module))
        return BITS_PER_BYTE * (tensors + len(self.text.encode()))


def stored_activations(
    specs: Sequence[LinearSpec], grids: Sequence[BlockGrids], *, packed: Mapping[str, object]
) -> StoredActivations:
    """Where each grid is stored.

    Args:
        specs: the model's linear layers.
        grids: by block; input site or point of attention -> grid.
        packed: modules whose weights are packed, by name.

    Raises:
        CheckpointError: a grid is not one for the tensor, or is of numbers that cannot be stored; its place is named.
    """
    inputs: dict[str, UniformGrid] = {}
    table: list[BlockGrids] = []
    for block, places in enumerate(grids):
        left: dict[str, ActivationGrid] = {}
        for place, grid in places.items():
            _check(grid, f"block {block}, {place}")
            readers = [spec.name for spec in specs if spec.block == block and spec.input_site == place]
            if (
                readers
                and isinstance(grid, UniformGrid)
                and zero_point(grid) is not None
                and packed.keys() >= {*readers}
            ):
                inputs |= dict.fromkeys(readers, grid)
            else:
                left[place] = grid
        table.append(left)
    return StoredActivations(inputs=inputs, table=tuple(table))


def zero_point(grid: UniformGrid) -> int | None:
    """Signed code that stands for zero; None where none does, or where the offset is no whole number of steps."""
    steps = (grid.offset / grid.scale).round()
    if not torch.equal(steps * grid.scale, grid.offset):
        return None
    z = -int(steps)
    return z - 2 ** (grid.bits - 1) if 0 <= z < 2**grid.bits else None


def grid_of(scale: Tensor, signed_zero: int, bits: int) -> UniformGrid:
    """Inverse of ``zero_point``, to the bit."""
    s = scale.float().reshape(())
    return UniformGrid(bits=bits, scale=s, offset=-(signed_zero + 2 ** (bits - 1)) * s)


def input_tensors(module: str) -> tuple[StoredTensor, StoredTensor]:
    """The tensors of a layer's inputs."""
    return (
        StoredTensor(name=f"{module}.{INPUT_SCALE}", dtype=torch.float32, shape=(1,)),
        StoredTensor(name=f"{module}.{ZERO_POINT}", dtype=torch.int8, shape=(1,)),
    )


def input_values(module: str, grid: UniformGrid) -> dict[str, Tensor]:
    """Values of ``input_tensors``, of a grid that has a zero point."""
    return {
        f"{module}.{INPUT_SCALE}": grid.scale.detach().cpu().reshape(1),
        f"{module}.{ZERO_POINT}": torch.tensor([zero_point(grid)], dtype=torch.int8),
    }


def input_arguments(bits: int) -> dict[str, Any]:
    """``input_activations`` of a group of ``config.json``."""
    return {"num_bits": bits, "type": "int", "symmetric": False, "strategy": "tensor", "dynamic": False}


def grid_document(grid: ActivationGrid) -> dict[str, Any]:
    """A grid as JSON."""
    if isinstance(grid, UniformGrid):
        return {"type": "uniform", "bits": grid.bits, "scale": float(grid.scale), "offset": float(grid.offset)}
    assert isinstance(grid, LogarithmicGrid)
    return {
        "type": "logarithmic",
        "bits": grid.bits,
        "scale": grid.scale,
        "steps_per_octave": grid.steps_per_octave,
    }


def grid_from(document: Any, what: str) -> ActivationGrid:
    """Inverse of ``grid_document``.

    Raises:
        CheckpointError: it is no such document; ``what`` is named.
    """
    grid: ActivationGrid
    try:
        kind, bits, scale = document["type"], document["bits"], _number(document["scale"])
        if type(bits) is not int:
            raise ValueError(f"bits are {bits!r}")
        if kind == "uniform":
            offset = torch.tensor(_number(document["offset"]), dtype=torch.float32)
            grid = UniformGrid(bits=bits, scale=torch.tensor(scale, dtype=torch.float32), offset=offset)
        elif kind == "logarithmic":
            if type(document["steps_per_octave"]) is not int:
                raise ValueError(f"steps_per_octave is {document['steps_per_octave']!r}")
            grid = LogarithmicGrid(bits=bits, scale=scale, steps_per_octave=document["steps_per_octave"])
        else:
            raise ValueError(f"type {str(kind)[:40]!r}")
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{what}: no grid of activations ({type(error).__name__}: {error})") from error
    _check(grid, what)
    return grid


def digest(table: bytes) -> str:
    """sha256 of the table."""
    return hashlib.sha256(table).hexdigest()


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{str(value)[:40]!r} is no number")
    return float(value)


def _check(grid: ActivationGrid, what: str) -> None:
    """Raises CheckpointError for a grid that no checkpoint stores."""
    if not MIN_BITS <= grid.bits <= MAX_BITS:
        raise CheckpointError(f"{what}: activations of {grid.bits} bits; expected {MIN_BITS} to {MAX_BITS}")
    if isinstance(grid, UniformGrid):
        if grid.scale.numel() != 1 or grid.offset.numel() != 1:
            raise CheckpointError(f"{what}: has a step a channel; fold it into one for the tensor first")
        if grid.scale.dtype != torch.float32 or grid.offset.dtype != torch.float32:
            raise CheckpointError(f"{what}: a grid of {grid.scale.dtype}; expected {torch.float32}")
        numbers = [float(grid.scale), float(grid.offset)]
    elif isinstance(grid, LogarithmicGrid):
        numbers = [grid.scale]
        if grid.steps_per_octave < 1:
            raise CheckpointError(f"{what}: {grid.steps_per_octave} steps an octave; expected one at least")
    else:
        raise CheckpointError(f"{what}: a {type(grid).__name__} has no form in a checkpoint")
    if not all(map(math.isfinite, numbers)) or numbers[0] <= 0:
        raise CheckpointError(f"{what}: its numbers are {numbers}; expected finite ones and a positive step")
