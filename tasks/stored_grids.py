"""A grid's numbers as tensors, exactly, and the grids of a block as one object of the store."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from lrpq.activations.calibrate import BlockGrids
from lrpq.activations.grids import ActivationGrid, LogarithmicGrid, UniformGrid
from lrpq.errors import StoreError
from tasks.store.objects import ObjectStore
from tasks.store.tensors import read_metadata, read_tensors, write_tensors


def grid_tensors(grid: ActivationGrid) -> dict[str, Tensor]:
    """What a grid consists of, but for its width."""
    if isinstance(grid, LogarithmicGrid):
        return {
            "largest": torch.tensor(grid.scale, dtype=torch.float64),
            "steps": torch.tensor(grid.steps_per_octave),
        }
    assert isinstance(grid, UniformGrid)
    return {"scale": grid.scale, "offset": grid.offset}


def grid_of(tensors: Mapping[str, Tensor], *, bits: int) -> ActivationGrid:
    """Inverse of ``grid_tensors``.

    Raises:
        KeyError: a tensor is missing.
    """
    if "largest" in tensors:
        return LogarithmicGrid(bits=bits, scale=float(tensors["largest"]), steps_per_octave=int(tensors["steps"]))
    return UniformGrid(bits=bits, scale=tensors["scale"], offset=tensors["offset"])


def write_block_grids(store: ObjectStore, key: str, grids: BlockGrids, metadata: Mapping[str, str]) -> None:
    """Store a block's grids by place, in their order, with what else is to be known of the block."""
    tensors = {f"{place}|{part}": value for place, grid in grids.items() for part, value in grid_tensors(grid).items()}
    widths = json.dumps([[place, grid.bits] for place, grid in grids.items()])
    write_tensors(store, key, tensors, {"widths": widths, **metadata})


def read_block_grids(store: ObjectStore, key: str) -> BlockGrids:
    """Inverse of ``write_block_grids``.

    Raises:
        StoreError: the object is not there, damaged, or lacks a part.
    """
    tensors = read_tensors(store, key)
    found: dict[str, ActivationGrid] = {}
    for place, bits in json.loads(read_metadata(store, key)["widths"]):
        own = {name.rpartition("|")[2]: value for name, value in tensors.items() if name.rpartition("|")[0] == place}
        try:
            found[place] = grid_of(own, bits=bits)
        except KeyError as error:
            raise StoreError(f"{key}: lacks {error.args[0]} of {place}; delete it, and it is made again") from error
    return found
