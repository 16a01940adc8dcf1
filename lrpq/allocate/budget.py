"""Budgets: what the user asked for, turned into a hard capacity in bits.

Two units. *Bits* are all-in bits (codes, scales, zero points) per weight, averaged over the weights that
take part in the allocation. Modules held at 16 bits by a rule (``--keep ...=16``, a shape the target cannot
run) take no part: they are neither in the numerator nor in the denominator, or keeping a layer would
silently change what a budget means for all others. *Bytes* bound the whole checkpoint, those modules and
everything that is never quantized included.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

from lrpq.errors import BudgetError, ConfigError
from lrpq.notation import BITS_PER_BYTE

UNQUANTIZED_BITS = 16
SHOWN_DECIMALS = 4

_BYTE_UNITS = {
    "": 1,
    "b": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgtp", start=1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgtp", start=1)},
}
_BYTES = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What the capacity of a budget depends on besides the budget."""

    minimum_bits: int
    """Storage of the modules in the allocation when each takes its smallest option."""
    num_weights: int
    """Weights of the modules in the allocation."""
    left_bits: int
    """Storage of the modules held at 16 bits outside the allocation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetBits:
    """All-in bits per weight over the modules in the allocation.

    Raises:
        BudgetError: not a positive number, or above 16.
    """

    bits: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.bits) or self.bits <= 0:
            raise BudgetError(f"budget of {self.bits} bits: expected a positive number of bits per weight")
        if self.bits > UNQUANTIZED_BITS:
            raise BudgetError(f"budget of {self.bits:g} bits is above {UNQUANTIZED_BITS}, the unquantized size")

    def capacity_bits(self, sizes: Sizes) -> int:
        """Return floor(bits * weights), with ``bits`` read as the decimal number the user wrote.

        Raises:
            BudgetError: below the smallest possible, which is named (rounded up, so it works as it stands).
        """
        capacity = math.floor(Fraction(repr(float(self.bits))) * sizes.num_weights)
        if capacity < sizes.minimum_bits:
            raise BudgetError(
                f"budget of {self.bits:g} bits is impossible with these choices; the smallest possible is "
                f"{smallest_bits(sizes)} bits; raise --budget or allow narrower choices"
            )
        return capacity


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetBytes:
    """Bytes of the whole checkpoint."""

    total_bytes: int
    fixed_bytes: int
    """Upper bound of all but the block linears: embeddings, norms, head, weight_shape tensors, headers."""

    def __post_init__(self) -> None:
        if self.total_bytes <= 0:
            raise BudgetError(f"budget of {self.total_bytes} bytes: expected a positive number")
        if self.fixed_bytes < 0:
            raise ConfigError(f"fixed size of {self.fixed_bytes} bytes: expected 0 or more")

    def capacity_bits(self, sizes: Sizes) -> int:
        """Return the bits that are left for the modules in the allocation.

        Raises:
            BudgetError: below the smallest possible, which is named, or above the checkpoint at 16 bits.
        """
        outside = self.fixed_bytes * BITS_PER_BYTE + sizes.left_bits
        smallest = -(-(outside + sizes.minimum_bits) // BITS_PER_BYTE)
        if self.total_bytes < smallest:
            raise BudgetError(
                f"budget of {self.total_bytes} bytes is impossible with these choices; the smallest "
                f"possible is {smallest} bytes, of which {-(-outside // BITS_PER_BYTE)} are not quantized; "
                f"raise --budget-bytes or allow narrower choices"
            )
        largest = -(-(outside + UNQUANTIZED_BITS * sizes.num_weights) // BITS_PER_BYTE)
        if self.total_bytes > largest:
            raise BudgetError(
                f"budget of {self.total_bytes} bytes is above the {largest} bytes of the checkpoint at "
                f"{UNQUANTIZED_BITS} bits: nothing has to be quantized"
            )
        return self.total_bytes * BITS_PER_BYTE - outside


Budget = BudgetBits | BudgetBytes


def bits_for(total_bits: int, *, num_weights: int) -> float:
    """Bits a weight whose capacity is ``total_bits``, or the least above it that is a number of Python."""
    found = total_bits / num_weights
    return found if Fraction(repr(found)) * num_weights >= total_bits else math.nextafter(found, math.inf)


def smallest_bits(sizes: Sizes) -> str:
    """Return the smallest possible bits per weight as text, rounded up so that it is a feasible budget."""
    scale = 10**SHOWN_DECIMALS
    steps = math.ceil(Fraction(sizes.minimum_bits * scale, sizes.num_weights))
    return f"{steps // scale}.{steps % scale:0{SHOWN_DECIMALS}d}"


def parse_bytes(text: str) -> int:
    """Read ``40GB`` (powers of 1000), ``37.5GiB`` (powers of 1024) or plain bytes.

    Fractions of a byte are dropped.

    Raises:
        ConfigError: not a positive size with a known unit.
    """
    match = _BYTES.fullmatch(text)
    unit = _BYTE_UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise ConfigError(f"size {text!r}: expected a number and a unit such as 40GB, 37.5GiB or 900MB")
    total = int(Fraction(match[1]) * unit)
    if total <= 0:
        raise ConfigError(f"size {text!r}: expected more than 0 bytes")
    return total
