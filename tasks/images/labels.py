"""From what a source calls its classes to the classes of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lrpq.errors import CalibrationError


def class_indices(names: Sequence[str], config: Any, *, source: str) -> dict[str, int]:
    """Index of every class.

    By name where the model's ``label2id`` has all of them. Where it has none, by number where the names are whole
    numbers, and by their place in sorted order, as torchvision's ImageFolder counts folders, where there are as many as
    the model has classes.

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
    strangers = [name for name in sorted(names) if name not in known]
    if len(strangers) == len(names) and all(name.isascii() and name.isdecimal() for name in names):
        numbers = {name: int(name) for name in names}
        if len(set(numbers.values())) == len(names) and all(number < num_classes for number in numbers.values()):
            return numbers
    elif len(strangers) == len(names) == num_classes:
        return {name: index for index, name in enumerate(sorted(names))}
    raise CalibrationError(
        f"images {source}: class {strangers[0]!r} is none of the model's (label2id), and {len(names)} classes "
        f"are not its {num_classes}: which is which cannot be told; name them as label2id does, or give --no-top1"
    )
