"""What a user may name as images.

FOLDER                          class folders of image files, or image files without labels
hub:DATASET[:CONFIG[:SPLIT]]    through ``datasets``; DATASET may be a local folder
OWNER/DATASET                   short for hub:OWNER/DATASET
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from lrpq.errors import ConfigError
from tasks.calibration.sources import HubSource, parse_source

FORMS = "FOLDER or hub:DATASET[:CONFIG[:SPLIT]]"


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderSource:
    """A folder with image files."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)


ImageSource: TypeAlias = FolderSource | HubSource


def parse_image_source(text: str) -> ImageSource:
    """Read a source as the user writes it.

    Raises:
        ConfigError: neither a folder nor a data set's name.
    """
    text = text.strip()
    if text.startswith("hub:"):
        found = parse_source(text)
        assert isinstance(found, HubSource)
        return found
    path = os.path.expanduser(text)
    if os.path.isdir(path):
        return FolderSource(path=Path(os.path.abspath(path)))
    if os.path.exists(path):
        raise ConfigError(f"images {text!r}: is a file; give {FORMS}")
    named = not os.path.isabs(path) and not text.startswith((".", "~")) and text.count("/") == 1 and ":" not in text
    if named and all(text.split("/")):
        return HubSource(dataset=text)
    raise ConfigError(f"images {text!r}: no such folder; give {FORMS}")
