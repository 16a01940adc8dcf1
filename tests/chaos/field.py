"""The model that is compressed again and again."""

from __future__ import annotations

import sys
from pathlib import Path


def model_in(folder: Path, *, layers: int) -> Path:
    """Write it."""
    tests = Path(__file__).parents[1]
    sys.path[:0] = [str(tests), str(tests / "integration")]  # as pytest has it
    from pipeline_case import write_model

    return write_model(folder / "model", layers=layers)
