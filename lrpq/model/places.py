"""Where a model's blocks are, in the order in which hidden states meet them: one list, or one list a stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from lrpq.errors import ModelError
from lrpq.model.families import STAGE, Family


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockPlace:
    """One block of a model."""

    path: str
    """Module in the model, e.g. ``model.layers.3`` or ``swin.encoder.layers.1.downsample``."""
    module: nn.Module
    sites: Mapping[str, tuple[str, ...]]
    """Input site -> linear layers that read it, in the order of execution."""


def find_blocks(model: nn.Module, family: Family) -> tuple[BlockPlace, ...]:
    """The blocks; what merges patches behind a stage is one of them.

    Raises:
        ModelError: the model has no such list.
    """
    if STAGE not in family.blocks:
        return tuple(_listed(model, family.blocks, family.sites))
    stages, _, blocks = family.blocks.partition(f".{STAGE}.")
    found: list[BlockPlace] = []
    for index, _ in enumerate(_list(model, stages)):
        stage = f"{stages}.{index}"
        found += _listed(model, f"{stage}.{blocks}", family.sites)
        if family.merging is not None:
            path = f"{stage}.{family.merging.path}"
            module = dict(model.named_modules()).get(path)
            if module is not None:  # the last stage has none
                found.append(BlockPlace(path=path, module=module, sites=family.merging.sites))
    return tuple(found)


def _listed(model: nn.Module, path: str, sites: Mapping[str, tuple[str, ...]]) -> list[BlockPlace]:
    return [
        BlockPlace(path=f"{path}.{index}", module=module, sites=sites)
        for index, module in enumerate(_list(model, path))
    ]


def _list(model: nn.Module, path: str) -> nn.ModuleList:
    try:
        found = model.get_submodule(path)
    except AttributeError as error:
        raise ModelError(
            f"module {path}: not in the {type(model).__name__} that config.json describes; its architectures and its "
            "model_type do not fit each other"
        ) from error
    if not isinstance(found, nn.ModuleList):
        raise ModelError(f"module {path}: expected a list of blocks, got {type(found).__name__}")
    return found
