"""Images of a data set of the hub, or of a local folder that ``datasets`` reads, in an order drawn by a seed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from lrpq.errors import CalibrationError
from tasks.calibration.hub import HUB_ERRORS, check_reachable, hub_message
from tasks.calibration.sources import HubSource
from tasks.images.folder import UNLABELLED
from tasks.images.labels import class_indices

SHUFFLED = 1000
"""Rows that an order is drawn among at a time: streams cannot be drawn from as a whole."""
IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img", "pixel_values"), ("label", "labels", "fine_label")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubImage:
    """A row."""

    name: str
    raw: bytes | Path
    label: int


def hub_images(source: HubSource, config: Any, *, count: int, seed: int, labelled: bool) -> list[HubImage]:
    """The first images in the order that the seed draws; fewer where there are no more.

    Raises:
        CalibrationError: unreachable or unreadable, no column of images, or classes that are not the model's.
    """
    try:
        check_reachable(source)
        split: Any = datasets.load_dataset(source.dataset, source.config, split=source.split, streaming=True)
        features = split.features or {}
        column = _column(features, datasets.Image, IMAGE_COLUMNS)
        if column is None:
            raise CalibrationError(f"{source}: no column of images; it has {', '.join(features) or 'no known columns'}")
        labels = _column(features, datasets.ClassLabel, LABEL_COLUMNS) if labelled else None
        index = _indices(features[labels], config, source) if labels is not None else {}
        rows = split.cast_column(column, datasets.Image(decode=False)).shuffle(seed=seed, buffer_size=SHUFFLED)
        return list(_images(itertools.islice(iter(rows), count), column, labels, index, source))
    except HUB_ERRORS as error:
        raise CalibrationError(hub_message(source, error)) from error


def _images(
    rows: Iterator[Any], column: str, labels: str | None, index: dict[int, int], source: HubSource
) -> Iterator[HubImage]:
    for number, row in enumerate(rows):
        image, label = row[column], None if labels is None else row[labels]
        if not image.get("bytes") and "://" in (image.get("path") or ""):
            raise CalibrationError(
                f"{source}: its rows name files elsewhere ({image['path']}) instead of holding the images; fetch the "
                "data set and give its folder"
            )
        raw = image.get("bytes") or (Path(image["path"]) if image.get("path") else None)
        name = f"{image.get('path') or f'number {number}'} of {source}"
        if raw is None:
            raise CalibrationError(f"image {name}: has neither bytes nor a path")
        yield HubImage(name=name, raw=raw, label=UNLABELLED if label is None else index.get(int(label), UNLABELLED))


def _column(features: Any, kind: type, names: tuple[str, ...]) -> str | None:
    typed = [name for name, feature in features.items() if isinstance(feature, kind)]
    return next((name for name in names if name in typed), typed[0] if typed else None)


def _indices(feature: Any, config: Any, source: HubSource) -> dict[int, int]:
    """Label of the data set -> class of the model: by name; as they are where no name is known and they are as many."""
    names = list(feature.names)
    if len(names) == int(config.num_labels) and not any(name in (config.label2id or {}) for name in names):
        return {i: i for i in range(len(names))}
    found = class_indices(names, config, source=str(source))
    return {i: found[name] for i, name in enumerate(names)}
