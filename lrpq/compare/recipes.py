"""A method as data."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from lrpq.quant.row_feedback import DEFAULT_BLOCKS
from lrpq.tune.options import Trained


class Rounding(enum.Enum):
    """How codes are found."""

    GPTQ = "gptq"
    """Static activation order."""
    GPTQ_IN_ORDER = "gptq, columns from left to right"
    NEAREST = "nearest"
    """Scales searched under the diagonal of H."""
    STITCHED = "gptq on the original inputs"
    """As the candidates that the allocation was made from: no layer behind quantized ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The default is lrpq's; a method replaces what its name says."""

    allocation: str = "lrpq"
    """Measure of importance, or "uniform"."""
    weighting: str = "blend"
    """Token weights of the Hessians that codes are made with."""
    rounding: Rounding = Rounding.GPTQ
    correction: float = 0.5
    """Strength a of the correction for the quantized layers before; 0 corrects nothing."""
    correction_damping: float = 0.1
    polish_rounds: int = 2
    """Of coordinate descent and refit after rounding."""
    row_blocks: int = DEFAULT_BLOCKS
    """Blocks of rows that make up for the errors of the blocks before them; 1 rounds each row on its own."""
    tuning: str = "none"
    """What is tuned on the divergence from the original when all codes are found; a name of TUNINGS."""
    transform: str = "none"
    """Of the model before it is quantized."""
    wide_scales: bool = False
    """Scales of 16 bits, whatever the terms allow."""
    uniform_codes: bool = False
    """No trellis, whatever the terms say."""


TUNINGS: Mapping[str, Trained] = {
    "scales": Trained.SCALES,
    "gains": Trained.VECTORS,
    "scales+gains": Trained.SCALES | Trained.VECTORS,
    "codes": Trained.SCALES | Trained.VECTORS | Trained.CODES,
}
"""One pass over the calibration windows each; gains are those of the norms, which stay as they are stored."""
DEFAULT = Recipe()
CONTROL = Recipe(
    allocation="uniform",
    weighting="none",
    correction=0.0,
    polish_rounds=0,
    row_blocks=1,
    wide_scales=True,
    uniform_codes=True,
)
"""The strong uniform GPTQ: sequential, static activation order, searched scales in bfloat16."""
FAST = Recipe(
    allocation="fast",
    weighting="none",
    rounding=Rounding.STITCHED,
    correction=0.0,
    polish_rounds=0,
    row_blocks=1,
)
"""`lrpq compress --fast`."""
STITCHED = Recipe(rounding=Rounding.STITCHED, correction=0.0, polish_rounds=0, row_blocks=1)
"""`lrpq compress --refine stitch`."""
