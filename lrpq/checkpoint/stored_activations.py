"""Reading the activation grids of a checkpoint back: the very grids that were written, or an error that names one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lrpq.activations.grids import MAX_BITS, ActivationGrid, UniformGrid
from lrpq.checkpoint.activations import (
    INPUT_SCALE,
    MIN_BITS,
    SECTION,
    TABLE,
    VERSION,
    ZERO_POINT,
    BlockGrids,
    digest,
    grid_from,
    grid_of,
)
from lrpq.checkpoint.modules import WEIGHT
from lrpq.checkpoint.stored import StoredCheckpoint
from lrpq.errors import CheckpointError
from lrpq.model.layers import LinearSpec
from lrpq.model.safetensors_source import one_line


def read_grids(
    stored: StoredCheckpoint, sites: Sequence[Mapping[str, Sequence[LinearSpec]]], points: Sequence[str]
) -> tuple[dict[str, ActivationGrid], ...]:
    """Grids by block, of input sites and points of attention; places without one stay in full precision.

    Args:
        stored: the checkpoint.
        sites: by block; input site -> the layers that read it.
        points: names of the points of attention.

    Raises:
        CheckpointError: a grid is damaged, layers of one site have different ones, or the table is missing, damaged or
            names a place that the model does not have.
    """
    table = read_table(stored.folder)
    if table is not None and len(table) != len(sites):
        raise CheckpointError(f"{stored.folder / TABLE}: has {len(table)} blocks, the model {len(sites)}")
    found: list[dict[str, ActivationGrid]] = []
    for block, members in enumerate(sites):
        grids = dict(table[block]) if table is not None else {}
        unknown = [place for place in grids if place not in members and place not in points]
        if unknown:
            raise CheckpointError(
                f"{stored.folder / TABLE}: block {block} has a grid for {unknown[0]!r}; expected one of "
                f"{[*members, *points]}"
            )
        for site, specs in members.items():
            grid = _shared_grid(stored, site, specs)
            if grid is not None and site in grids:
                raise CheckpointError(f"{stored.folder}: block {block} has two grids for {site}; expected one")
            if grid is not None:
                grids[site] = grid
        found.append(grids)
    return tuple(found)


def input_grid(stored: StoredCheckpoint, module: str) -> UniformGrid | None:
    """Grid of a module's inputs in compressed-tensors' form; None where it has none. ``module`` as it is on disk.

    Raises:
        CheckpointError: it is not static, of integers, one for the tensor; or a tensor of it is missing or damaged.
    """
    arguments = stored.inputs(module)
    if arguments is None:
        return None
    where = f"module {module} in {stored.folder}"
    try:
        bits = arguments["num_bits"]
        kind = arguments.get("type", "int"), arguments.get("strategy", "tensor"), arguments.get("dynamic", False)
        symmetric = arguments.get("symmetric", True)
    except (LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{where}: input_activations are not described ({one_line(error)})") from error
    if kind != ("int", "tensor", False) or type(bits) is not int or not MIN_BITS <= bits <= MAX_BITS:
        raise CheckpointError(
            f"{where}: inputs of {bits!r} bits, {kind!r}; expected static integers of {MIN_BITS} to {MAX_BITS} bits, "
            "one scale a tensor"
        )
    scale = stored.part(module, INPUT_SCALE)
    zero = torch.zeros(1) if symmetric is True else stored.part(module, ZERO_POINT)
    if scale.numel() != 1 or not bool(torch.isfinite(scale).all()) or not float(scale) > 0:
        raise CheckpointError(f"{where}: its {INPUT_SCALE} is not one positive number; fetch the checkpoint again")
    if zero.numel() != 1 or not -(2 ** (bits - 1)) <= int(zero) < 2 ** (bits - 1):
        raise CheckpointError(f"{where}: its {ZERO_POINT} is no code of {bits} bits; fetch the checkpoint again")
    return grid_of(scale, int(zero), bits)


def read_table(folder: Path) -> tuple[BlockGrids, ...] | None:
    """Grids of ``activations.json`` by block; None where config.json knows no table.

    Raises:
        CheckpointError: the table is missing, damaged or of a later version.
    """
    section = _section(folder)
    if section is None:
        return None
    path = folder / TABLE
    try:
        if not path.is_file():  # a pipe or a device would be read without end
            raise FileNotFoundError("no such file")
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: missing or unreadable ({one_line(error)}); fetch the file again") from error
    if digest(content) != section["sha256"]:
        raise CheckpointError(f"{path}: is not the file that config.json was written with; fetch both again")
    return table_from(content, path)


def table_from(content: bytes, path: Path) -> tuple[BlockGrids, ...]:
    """The grids of a table by block.

    Raises:
        CheckpointError: it is damaged or of a later version; ``path``, where it lies, is named.
    """
    try:
        document = json.loads(content)
        version, blocks = document["version"], document["blocks"]
        if version != VERSION or not all(isinstance(grids, dict) for grids in blocks):
            raise ValueError(f"version {version!r} of {len(blocks)} blocks")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: no table of activation grids, version {VERSION} ({one_line(error)})") from error
    return tuple(
        {place: grid_from(grid, f"{path}: block {block}, {place[:40]!r}") for place, grid in grids.items()}
        for block, grids in enumerate(blocks)
    )


def _section(folder: Path) -> dict[str, Any] | None:
    path = folder / "config.json"
    try:
        document = json.loads(path.read_bytes())
        if SECTION not in document:
            return None
        section = document[SECTION]["activations"]
        if section["version"] != VERSION or not isinstance(section["sha256"], str):
            raise ValueError(f"version {section['version']!r}")
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: {SECTION!r} describes no activations, version {VERSION} ({one_line(error)})"
        ) from error
    return dict(section)


def _shared_grid(stored: StoredCheckpoint, site: str, specs: Sequence[LinearSpec]) -> UniformGrid | None:
    """The one grid of a site, from all the layers that read it."""
    modules = [tensor.removesuffix(WEIGHT) for spec in specs for tensor in spec.stored]
    grids = [input_grid(stored, module) for module in modules]
    first = grids[0]
    for module, grid in zip(modules, grids, strict=True):
        same = (first is None and grid is None) or (
            first is not None
            and grid is not None
            and first.bits == grid.bits
            and torch.equal(first.scale, grid.scale)
            and torch.equal(first.offset, grid.offset)
        )
        if not same:
            raise CheckpointError(
                f"module {module} in {stored.folder}: its inputs have another grid than those of {modules[0]}, which "
                f"are the same ({site}); fetch the checkpoint again"
            )
    return first
