"""lrpq.json, the manifest beside the checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lrpq.errors import CheckpointError

MANIFEST = "lrpq.json"


def write_manifest_file(path: Path, manifest: Mapping[str, Any]) -> None:
    """Replace the file in one step: a reader sees the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(manifest, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_manifest_file(path: Path) -> dict[str, Any] | None:
    """The manifest, or None where there is none.

    Raises:
        CheckpointError: the file is there but is not a manifest.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a manifest of lrpq ({error}); give another --output") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: not a manifest of lrpq; give another --output")
    return found
