"""The numbers that a scale can be, as a checkpoint stores it: bfloat16, or float8 with 4 bits of exponent (e4m3).

A float8 scale has 4 significant binary digits, so the nearest one is within 1/16 of what is wanted, and half of the
bytes of a bfloat16 one. A group's error as a function of its scale is flat around its minimum, so that few digits cost
little, and the bytes buy smaller groups or wider codes (docs/methods.md, section 3). Its magnitudes end at 2^-9 and
448, with fewer digits below 2^-6; a search sees every error as stored, so it sees that too.

Source of the format: Micikevicius et al. 2022, FP8 Formats for Deep Learning (arXiv:2209.05433); torch's
``float8_e4m3fn``, safetensors' ``F8_E4M3``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrpq.errors import QuantizationError

if TYPE_CHECKING:
    from jaxtyping import Float

DTYPES = {16: torch.bfloat16, 8: torch.float8_e4m3fn}
"""Bits of a scale -> what it is stored as."""
SMALLEST_FLOAT8 = 2.0**-9
LARGEST_FLOAT8 = 448.0


def dtype_of(scale_bits: int) -> torch.dtype:
    """What scales of so many bits are stored as. Raises QuantizationError where nothing is."""
    if scale_bits not in DTYPES:
        raise QuantizationError(f"scales of {scale_bits} bits cannot be stored: choose one of {sorted(DTYPES)}")
    return DTYPES[scale_bits]


def nearest(s: Float[Tensor, "*shape"], scale_bits: int) -> Float[Tensor, "*shape"]:
    """Round to what is stored, half to even, and keep the dtype.

    What would vanish becomes the smallest number of its sign (of bfloat16 the smallest normal one); beyond the largest
    float8 that one is taken. NaN stays, and in bfloat16 infinity.
    """
    stored = dtype_of(scale_bits)
    if stored is torch.bfloat16:
        smallest, rounded = torch.finfo(stored).tiny, s.to(stored).to(s.dtype)
    else:
        # through float32: torch rounds float64 to float8 by way of it anyway
        smallest, rounded = SMALLEST_FLOAT8, s.clamp(-LARGEST_FLOAT8, LARGEST_FLOAT8).to(stored).to(s.dtype)
    return torch.where(rounded.abs() < smallest, torch.where(s < 0, -smallest, smallest), rounded)


def storable(s: Float[Tensor, "*shape"], bits: int, scale_bits: int = 16) -> Float[Tensor, "*shape"]:
    """``nearest``; no magnitude so large that the lowest code of ``bits`` times it leaves bfloat16's range."""
    limit = torch.finfo(torch.bfloat16).max / 2 ** (bits - 1)
    return nearest(s, scale_bits).clamp_(-limit, limit)
