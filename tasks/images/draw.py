"""Which images are calibrated on, held out and measured: disjoint, drawn by a seed.

An order is drawn for the whole source. Calibration takes the first ones, what is held out follows, and behind these
come the images that are measured, where no other source is named for them.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedConfig

from lrpq.errors import CalibrationError
from tasks.calibration.sources import HubSource
from tasks.images.folder import UNLABELLED, list_folder
from tasks.images.hub import hub_images
from tasks.images.preprocess import Preprocessor
from tasks.images.sources import FolderSource, ImageSource

if TYPE_CHECKING:
    from jaxtyping import Float, Int64
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """Images in memory."""

    pixels: Float[Tensor, "n channels height width"]
    labels: Int64[Tensor, " n"]
    """-1 where there is none."""

    def part(self, start: int, stop: int | None) -> Drawn:
        """Some of them."""
        return Drawn(pixels=self.pixels[start:stop], labels=self.labels[start:stop])

    @property
    def labelled(self) -> bool:
        """Whether every image has a label."""
        return bool((self.labels != UNLABELLED).all())

    @property
    def digest(self) -> str:
        """sha256 of pixels and labels."""
        found = hashlib.sha256(str(list(self.pixels.shape)).encode())
        for tensor in (self.pixels, self.labels):
            found.update(tensor.contiguous().numpy().tobytes())
        return found.hexdigest()


def draw(
    source: ImageSource,
    model: Path,
    config: PreTrainedConfig,
    *,
    skip: int,
    count: int,
    seed: int,
    labelled: bool,
) -> Drawn:
    """Images number ``skip`` and following in the order that the seed draws; fewer where there are no more.

    Args:
        source: of the images.
        model: local folder, with the processor.
        config: of the model.
        skip: images that have another use.
        count: of images.
        seed: of the order.
        labelled: look for labels.

    Raises:
        CalibrationError: an image cannot be read or has the wrong size, or none is left.
        LrpqError: see ``Preprocessor``, ``list_folder`` and ``hub_images``.
    """
    processor = Preprocessor(model, config)
    items: list[tuple[str, bytes | Path]]
    if isinstance(source, HubSource):
        rows = hub_images(source, config, count=skip + count, seed=seed, labelled=labelled)[skip:]
        items, labels = [(row.name, row.raw) for row in rows], [row.label for row in rows]
    else:
        files = list_folder(source.path, config, labelled=labelled)
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed)).tolist()
        chosen = [files[i] for i in order[skip : skip + count]]
        items, labels = [(str(file.path), file.path) for file in chosen], [file.label for file in chosen]
    if not items:
        raise CalibrationError(f"images {source}: no more than {skip}, which are used already; give more")
    return Drawn(pixels=processor.read_all(items), labels=torch.tensor(labels, dtype=torch.int64))


def listing_digest(source: ImageSource) -> str:
    """Identity of a folder's files by name, size and time: a changed folder is read again; empty for the hub."""
    folder = source.path if isinstance(source, FolderSource) else Path(source.dataset)
    if not folder.is_dir():
        return ""
    found = hashlib.sha256()
    for base, folders, files in os.walk(folder, followlinks=True):  # class folders may be links
        folders.sort()
        for path in sorted(Path(base, name) for name in files):
            if path.is_file():
                about = path.stat()
                line = f"{path.relative_to(folder)}\0{about.st_size}\0{about.st_mtime_ns}\n"
                found.update(line.encode(errors="surrogateescape"))
    return found.hexdigest()
