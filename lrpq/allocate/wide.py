"""The same choices with scales of 16 bits, whatever candidates have: what a control has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lrpq.allocate.options import CostRow
from lrpq.quant.packing import storage_bits


def with_wide_scales(rows: Sequence[CostRow]) -> list[CostRow]:
    """Rows with 16 bits a scale, and what they then take; costs are those of the given rows."""
    return [_widened(row) for row in rows]


def _widened(row: CostRow) -> CostRow:
    if row.choice is None or row.choice.scale_bits == 16:
        return row
    choice = replace(row.choice, scale_bits=16)
    return replace(row, choice=choice, storage_bits=storage_bits(row.module.d_out, row.module.d_in, choice))
