"""How a model is changed as it is read: rotated, its sites scaled by powers of two, both or neither."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lrpq.model.safetensors_source import ModelSource
from lrpq.model.source import open_source
from lrpq.transform.exponents import Exponents, ScaledSource, StoredScaledSource
from lrpq.transform.rotated import RotatedSource, Rotation, StoredRotatedSource


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """With the original, all that the weights depend on that are compressed."""

    rotation: Rotation | None = None
    exponents: Exponents | None = None
    """Powers of two, of the rotated model's sites if it is rotated."""

    def __bool__(self) -> bool:
        return self.rotation is not None or self.exponents is not None


UNCHANGED = Change()


def changed(source: ModelSource, change: Change) -> ModelSource:
    """The changed model, in which the weights that compute are as exact as they can be.

    Raises:
        ModelError: the architecture computes another function then, or a power of two would round.
    """
    if change.rotation is not None:
        source = RotatedSource(source, change.rotation)
    return source if change.exponents is None else ScaledSource(source, change.exponents)


def changed_as_stored(source: ModelSource, change: Change) -> ModelSource:
    """The same as it is when it is loaded from a checkpoint: what computes has the stored dtype's values.

    Raises:
        ModelError: as `changed`.
    """
    if change.rotation is not None:
        source = StoredRotatedSource(source, change.rotation)
    return source if change.exponents is None else StoredScaledSource(source, change.exponents)


def open_changed(folder: Path | str, change: Change) -> ModelSource:
    """A model folder, changed.

    Raises:
        ModelError: the folder is not a readable model, or one that cannot be changed so.
    """
    return changed(open_source(folder), change)
