"""A rotated model without a copy of it (`folded`).

Nothing is kept but the gains of the norms and the factors of the rotations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from lrpq.model.safetensors_source import ModelSource
from lrpq.model.source import open_source
from lrpq.transform.folded import FoldedSource
from lrpq.transform.orthogonal import RotationKind
from lrpq.transform.rotation import RotationScope, drawn_plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """Which rotation; with the original, all that the rotated weights depend on."""

    kind: RotationKind
    scope: RotationScope
    seed: int


class RotatedSource(FoldedSource):
    """A model as `rotate` would write it; `read_rows` gives folded values as float32, before they are rounded.

    Args:
        source: the original.
        rotation: how it is rotated.

    Raises:
        ModelError: the architecture computes another function when rotated.
    """

    changed_by: ClassVar[str] = "rotated"
    instead: ClassVar[str] = "compress the model without the rotation"

    def __init__(self, source: ModelSource, rotation: Rotation) -> None:
        generator = torch.Generator("cpu").manual_seed(rotation.seed)
        super().__init__(source, drawn_plan(source, generator=generator, kind=rotation.kind, scope=rotation.scope))


class StoredRotatedSource(RotatedSource):
    """The same as it is when it is loaded from a checkpoint: what computes has the stored dtype's values."""

    def read_rows(self, names: Sequence[str]) -> Tensor:
        """Read tensors whose rows make one, each rounded once to its stored dtype."""
        return ModelSource.read_rows(self, names)


def open_rotated(folder: Path | str, rotation: Rotation | None) -> ModelSource:
    """A model folder as it is, or rotated.

    Raises:
        ModelError: the folder is not a readable model, or one that cannot be rotated.
    """
    source = open_source(folder)
    return source if rotation is None else RotatedSource(source, rotation)
