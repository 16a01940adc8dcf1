"""Options that stand for several others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FAST: Mapping[str, Any] = {
    "run.relevance": "fisher",
    "run.gradients_every": 8,
    "run.candidates.cost_rows": 32,
    "plan.refine": "stitch",
}
"""What ``--fast`` stands for, where the options themselves are not given."""
