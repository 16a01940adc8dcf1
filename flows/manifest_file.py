"""lrpq.json, the manifest beside the checkpoint."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lrpq.errors import CheckpointError
from tasks.store.documents import parse_object

MANIFEST = "lrpq.json"


def write_manifest_file(path: Path, manifest: Mapping[str, Any]) -> None:
    """Replace the file in one step: a reader sees the old one or the new one, whoever else writes it too."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    temporary.write_text(json.dumps(manifest, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_manifest_file(path: Path) -> dict[str, Any] | None:
    """The manifest, or None where there is none.

    Raises:
        CheckpointError: the file is there but is not a manifest.
    """
    try:
        if not path.exists():
            return None
        if not path.is_file():  # a device would be read without end
            raise ValueError("no file")
        return dict(parse_object(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a manifest of lrpq ({error}); give another --output") from error
