"""What all methods of a comparison share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lrpq.model.layers import Choice, all_choices
from lrpq.quant.grid import Grid


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Equal terms; the defaults are those of `lrpq compress` for a model whose scales are bfloat16."""

    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 8)
    """Code widths to choose from."""
    group_sizes: tuple[int, ...] = (64, -1)
    """Columns that share a scale; -1 is one scale a row."""
    scale_bits: int = 16
    """Of a group's scale: 16 is bfloat16, 8 is float8."""
    trellis: bool = False
    """Whether a plan's codes, but for the control's, are a trellis's where they can be (lrpq.allocate.trellis)."""
    grid: Grid = Grid.SIGNED
    damping: float = 0.01
    """Of GPTQ, share of the mean diagonal."""
    power: float = 0.5
    """Exponent of gradient token weights."""
    floor: float = 0.03
    """Weight that every token gets, share of the mean."""
    seed: int = 0
    """Of sampled labels and noise."""
    shards: int = 8
    micro_batch: int = 4
    """Windows computed at once."""
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"

    @property
    def choices(self) -> tuple[Choice, ...]:
        """All choices of width and group size that candidates are made of, on uniform grids."""
        return all_choices(self.bits, self.group_sizes, scale_bits=self.scale_bits)
