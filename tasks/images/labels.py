"""From what a source calls its classes to the classes of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lrpq.errors import CalibrationError


def class_indices(names: Sequence[str], config: Any, *, source: str) -> dict[str, int]:
    """Index of every class.

    By name where the model's ``label2id`` has all of them; otherwise by their place in sorted order, as torchvision's
    ImageFolder counts folders, where there are as many as the model has classes.

    Args:
        names: of all classes of the source.
        config: of the model.
        source: for messages.

    Raises:
        CalibrationError: neither tells which class is which.
    """
    known: Mapping[str, Any] = getattr(config, "label2id", None) or {}
    if all(name in known for name in names):
        return {name: int(known[name]) for name in names}
    num_classes = int(config.num_labels)
    if len(names) == num_classes:
        return {name: index for index, name in enumerate(sorted(names))}
    strange = next(name for name in sorted(names) if name not in known)
    raise CalibrationError(
        f"images {source}: class {strange!r} is none of the model's (label2id), and {len(names)} classes are not its "
        f"{num_classes}: which is which cannot be told; name them as label2id does, or give --no-top1"
    )
