"""Grids of activations in the store, and the model that they ask for: the original with its folds, as it is read.

A block's object holds the best grid of every width at every place; which widths are taken is chosen later.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lrpq.activations.calibrate import BlockGrids, Calibration, Candidate, Place
from lrpq.activations.folding import Folding, fold_plan
from lrpq.activations.grids import UniformGrid
from lrpq.errors import StoreError
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.streaming import BlockStream
from lrpq.transform.folded import FoldedSource
from tasks.artifacts import StageFolder
from tasks.store.objects import ObjectStore
from tasks.store.opened import open_store
from tasks.store.tensors import read_metadata, read_tensors, write_tensors
from tasks.stored_grids import grid_of, grid_tensors, read_block_grids

KIND, ENDING = "grids", "safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenGrids:
    """Grids in the store, at the widths that were chosen."""

    store: str
    folder: StageFolder
    widths: tuple[tuple[int, str, int], ...]
    """Block, site or point, bits."""
    num_blocks: int
    rebuilt: StageFolder | None = None
    """Stage whose grids, of the same widths, take the place of these; what is folded stays."""

    @property
    def digest(self) -> str:
        """Names the grids."""
        rebuilt = [] if self.rebuilt is None else [self.rebuilt.key]
        return hashlib.sha256(json.dumps([self.folder.key, self.widths, *rebuilt]).encode()).hexdigest()

    def by_place(self) -> dict[tuple[int, str], int]:
        """(block, site or point) -> bits."""
        return {(block, place): bits for block, place, bits in self.widths}


def chosen_grids(
    store: str, folder: StageFolder, widths: Mapping[tuple[int, str], int], num_blocks: int
) -> ChosenGrids:
    """From widths by place."""
    listed = tuple((block, place, bits) for (block, place), bits in widths.items())
    return ChosenGrids(store=store, folder=folder, widths=listed, num_blocks=num_blocks)


def read_grids(chosen: ChosenGrids) -> tuple[BlockGrids, ...]:
    """By block, for the folded model."""
    rebuilt = chosen.rebuilt
    if rebuilt is None:
        return _calibration(chosen).grids(chosen.by_place())
    store = open_store(chosen.store)
    return tuple(read_block_grids(store, rebuilt_key(rebuilt, block)) for block in range(chosen.num_blocks))


def rebuilt_with(chosen: ChosenGrids, folder: StageFolder) -> ChosenGrids:
    """The same folds, with the grids of a stage that has rebuilt the blocks."""
    return replace(chosen, rebuilt=folder)


def rebuilt_key(folder: StageFolder, block: int) -> str:
    """Key of a rebuilt block's grids."""
    return folder.block(KIND, block, ENDING)


def folding_at(chosen: ChosenGrids, block: int, site: str) -> Folding | None:
    """What is folded at one site; None where nothing is."""
    place = read_block(open_store(chosen.store), chosen.folder, block).get((block, site))
    return None if place is None else place.candidates[chosen.by_place()[block, site]].folding


def fold(source: ModelSource, chosen: ChosenGrids) -> ModelSource:
    """The model that the grids are of, in float32; the same model where nothing is folded.

    Raises:
        LrpqError: see `fold_plan` and `read_tensors`.
    """
    foldings = _calibration(chosen).foldings(chosen.by_place())
    if not foldings:
        return source
    stream = BlockStream(source, dtype=torch.float32)
    return FoldedSource(source, fold_plan(stream, foldings), dtype=torch.float32)


def _calibration(chosen: ChosenGrids) -> Calibration:
    return read_calibration(open_store(chosen.store), chosen.folder, range(chosen.num_blocks))


def read_calibration(store: ObjectStore, folder: StageFolder, blocks: Sequence[int]) -> Calibration:
    """What was stored of some blocks."""
    places: dict[tuple[int, str], Place] = {}
    for block in blocks:
        places |= read_block(store, folder, block)
    return Calibration(places=places)


def write_block(store: ObjectStore, folder: StageFolder, block: int, places: Mapping[tuple[int, str], Place]) -> None:
    """Store the candidates of a block's places, in their order."""
    tensors: dict[str, Tensor] = {}
    listed = []
    for (_, name), place in places.items():
        listed.append([name, place.num_values, place.row, list(place.candidates)])
        for width, candidate in place.candidates.items():
            prefix = f"{name}|{width}|"
            tensors |= {prefix + part: value for part, value in _tensors(candidate).items()}
    write_tensors(store, folder.block(KIND, block, ENDING), tensors, {"places": json.dumps(listed)})


def read_block(store: ObjectStore, folder: StageFolder, block: int) -> dict[tuple[int, str], Place]:
    """Inverse of ``write_block``."""
    key = folder.block(KIND, block, ENDING)
    tensors = read_tensors(store, key)
    found: dict[tuple[int, str], Place] = {}
    for name, num_values, row, widths in json.loads(read_metadata(store, key)["places"]):
        candidates = {width: _candidate(tensors, f"{name}|{width}|", width, key) for width in widths}
        found[block, name] = Place(num_values=num_values, row=row, candidates=candidates)
    return found


def _tensors(candidate: Candidate) -> dict[str, Tensor]:
    """A candidate's numbers, exactly."""
    found = {"cost": torch.tensor(candidate.cost, dtype=torch.float64), **grid_tensors(candidate.grid)}
    if candidate.folding is not None:
        found |= {"ratio": candidate.folding.ratio, "before": candidate.folding.before}
    return found


def _candidate(tensors: Mapping[str, Tensor], prefix: str, width: int, key: str) -> Candidate:
    found = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    folding: Folding | None = None
    try:
        grid = grid_of(found, bits=width)
        if isinstance(grid, UniformGrid) and "ratio" in found:
            folding = Folding(ratio=found["ratio"], before=found["before"], grid=grid)
        return Candidate(grid=grid, folding=folding, cost=float(found["cost"]))
    except KeyError as error:
        raise StoreError(f"{key}: lacks {prefix}{error.args[0]}; delete it, and it is made again") from error
