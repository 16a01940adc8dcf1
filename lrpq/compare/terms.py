"""What all methods of a comparison share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lrpq.model.layers import Choice
from lrpq.quant.grid import Grid


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Equal terms; the defaults are those of `lrpq compress`."""

    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 8)
    """Code widths to choose from."""
    group_sizes: tuple[int, ...] = (64, -1)
    """Columns that share a scale; -1 is one scale a row."""
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
        """All choices of (bits, group size)."""
        return tuple(Choice(bits=b, group_size=g) for b in self.bits for g in self.group_sizes)
