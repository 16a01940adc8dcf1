"""Image files of a folder, with the labels that their folders give them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrpq.errors import CalibrationError
from tasks.images.labels import class_indices

ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"})
UNLABELLED = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFile:
    """One image."""

    path: Path
    label: int
    """Class of the model; -1 where none is known."""


def list_folder(folder: Path, config: Any, *, labelled: bool) -> list[ImageFile]:
    """All images of a folder, in the order of their names.

    Args:
        folder: with a folder a class, in which images may lie at any depth; or with images.
        config: of the model, whose classes they are.
        labelled: look for labels; otherwise class folders are folders like any.

    Raises:
        CalibrationError: no images, images both inside and beside class folders, or classes that are not the model's.
    """
    try:
        entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise CalibrationError(f"images {folder}: cannot be read ({error.strerror})") from error
    beside = [path for path in entries if _is_image(path)]
    classes = {path.name: list(_inside(path)) for path in entries if path.is_dir()}
    classes = {name: paths for name, paths in classes.items() if paths}
    if not beside and not classes:
        raise CalibrationError(
            f"images {folder}: no image files in it; expected a folder a class, or files such as a.png, b.jpg"
        )
    if not labelled or not classes:
        paths = beside + [path for inside in classes.values() for path in inside]
        return [ImageFile(path=path, label=UNLABELLED) for path in paths]
    if beside:
        raise CalibrationError(
            f"images {folder}: {beside[0].name} lies beside class folders such as {next(iter(classes))}; move it into "
            "its class, or give --no-top1"
        )
    index = class_indices(list(classes), config, source=str(folder))
    return [ImageFile(path=path, label=index[name]) for name, paths in classes.items() for path in paths]


def _inside(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if _is_image(path))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in ENDINGS and not path.name.startswith(".") and path.is_file()
