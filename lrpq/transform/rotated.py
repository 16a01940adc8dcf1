"""A rotated model without a copy of it: every tensor is folded when it is read.

What is read is one tensor of the original, and its folded values go through float64 in parts (`folds.folded`). Nothing
is kept but the gains of the norms and the factors of the rotations.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lrpq.errors import CheckpointError, ModelError
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.source import open_source
from lrpq.transform.folds import FoldedTensor, folded
from lrpq.transform.orthogonal import RotationKind
from lrpq.transform.rotation import RotationScope, drawn_plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """Which rotation; with the original, all that the rotated weights depend on."""

    kind: RotationKind
    scope: RotationScope
    seed: int


class RotatedSource(ModelSource):
    """A model as `rotate` would write it; `read_rows` gives folded values as float32, before they are rounded.

    Args:
        source: the original.
        rotation: how it is rotated.

    Raises:
        ModelError: the architecture computes another function when rotated.
    """

    as_on_disk: ClassVar[bool] = False

    def __init__(self, source: ModelSource, rotation: Rotation) -> None:
        self._source = source  # everything public is answered from it
        self.folder = source.folder
        generator = torch.Generator("cpu").manual_seed(rotation.seed)
        plan = drawn_plan(source, generator=generator, kind=rotation.kind, scope=rotation.scope)
        unchanged = {name: FoldedTensor(name=name, origin=name, folds=()) for name in source.names()}
        self._made = unchanged | dict(plan.tensors)
        self._document = source.config_document() | dict(plan.config_changes)
        self.config = deepcopy(source.config)
        for field, value in plan.config_changes.items():
            setattr(self.config, field, value)

    @property
    def unties_head(self) -> bool:
        """Whether the original's head is its embedding."""
        return bool(self._source.config.tie_word_embeddings) and not self.config.tie_word_embeddings

    @property
    def added_bytes(self) -> int:
        """What the model takes more than the original: a head that was the embedding."""
        return sum(self.nbytes(name) for name in self._made if name not in self._source)

    def config_document(self) -> dict[str, Any]:
        """The configuration to write."""
        return dict(self._document)

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._made)

    def __contains__(self, name: str) -> bool:
        return name in self._made

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return self._source.shape(self._tensor(name).origin)

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a tensor; see `ModelSource.dtype`."""
        return self._source.dtype(self._tensor(name).origin)

    def nbytes(self, name: str) -> int:
        """Bytes a tensor takes in the stored dtype."""
        return self._source.nbytes(self._tensor(name).origin)

    def read(self, name: str) -> Tensor:
        """Read one tensor, rounded once to its stored dtype; see `ModelSource.read`."""
        return self._folded(name, self.dtype(name))

    def read_rows(self, names: Sequence[str]) -> Tensor:
        """Read tensors whose rows make one; what is folded, as float32 (float64 where that is stored)."""
        rows = [self._folded(name, torch.promote_types(self.dtype(name), torch.float32)) for name in names]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def _folded(self, name: str, dtype: torch.dtype) -> Tensor:
        made = self._tensor(name)
        values = self._source.read(made.origin)
        if not made.folds or values.is_meta:
            return values
        try:
            return folded(values, made.folds, dtype=dtype, name=name)
        except CheckpointError as error:
            raise ModelError(
                f"tensor {name} of {self.folder}, rotated: a value leaves the range of {dtype}, in which it is stored; "
                "compress the model without the rotation"
            ) from error

    def _tensor(self, name: str) -> FoldedTensor:
        if name not in self._made:
            raise ModelError(f"model {self.folder}: tensor {name} is missing; the checkpoint is incomplete")
        return self._made[name]


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
