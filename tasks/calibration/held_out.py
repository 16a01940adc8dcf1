"""Windows of the calibration text that nothing is calibrated on."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from tasks.calibration.windows import Windows

if TYPE_CHECKING:
    from jaxtyping import Int64
    from torch import Tensor

SHARE = 8
"""One held-out window for so many that are calibrated on."""
MOST = 16
"""Enough for a mean: beyond it, they only take time."""


def default_held_out(num_windows: int) -> int:
    """How many windows are held out beside ``num_windows``."""
    return min(MOST, -(-num_windows // SHARE))


def split_held_out(windows: Windows, *, num_windows: int) -> tuple[Windows, Int64[Tensor, "held_out length"]]:
    """The windows to calibrate on, and those that are left.

    Where the text was too short for both, calibration comes first and nothing may be left.
    """
    kept = replace(windows, tokens=windows.tokens[:num_windows], asked_windows=num_windows)
    return kept, windows.tokens[num_windows:]
