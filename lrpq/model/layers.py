"""What can be quantized: linear layers, the input sites they read and the groups that serving kernels fuse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

HEAD = "head"
"""Input site of the language-model head, the one layer that lies in no block."""

TRELLIS_WIDTHS = (2, 3, 4, 5, 6)
"""Bits of a code that may be a symbol of a trellis: those that have a codebook (quant/trellis.py)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSpec:
    """One linear layer inside a decoder block, or the head."""

    name: str
    """Module name in the whole model, e.g. ``model.layers.3.self_attn.q_proj``."""
    block: int
    """Index of the decoder block; of the head, the number of blocks."""
    d_out: int
    d_in: int
    input_site: str
    """Name of the input inside the block (``qkv``, ``o``, ``gate_up``, ``down``; or ``HEAD``); its members share one
    Hessian."""
    fused_group: str
    """Modules with the same fused group share one choice of bits, e.g. ``model.layers.3.qkv``."""
    tensors: tuple[str, ...] = ()
    """Tensors on disk whose rows, one after the other, are its weight; by default ``name + '.weight'``."""
    routed: bool = False
    """An expert: it sees only the tokens that its router sends there."""

    @property
    def num_weights(self) -> int:
        """Number of weights."""
        return self.d_out * self.d_in

    @property
    def kind(self) -> str:
        """Last part of the name, e.g. ``q_proj``: the layer type in reports."""
        return self.name.rsplit(".", 1)[-1]

    @property
    def stored(self) -> tuple[str, ...]:
        """Names of its tensors on disk."""
        return self.tensors or (f"{self.name}.weight",)


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Choice:
    """A bit width and the number of columns that share a scale."""

    bits: int
    group_size: int
    """Columns per scale; -1 is one scale a row (per channel)."""
    scale_bits: int = 16
    """Of a stored scale: 16 is bfloat16, 8 is float8 (e4m3)."""
    trellis: bool = False
    """Whether codes are symbols of a trellis (quant/trellis.py), not steps of a uniform grid."""

    def groups(self, d_in: int) -> int:
        """Number of scales in a row of ``d_in`` columns."""
        return 1 if self.group_size == -1 else d_in // self.group_size

    def fits(self, d_in: int) -> bool:
        """Whether the group size divides the width."""
        return self.group_size == -1 or d_in % self.group_size == 0

    def __str__(self) -> str:
        """Short text such as ``4b/g64``, ``4b/channel``, with scales of 8 bits ``4b/g32/f8``, ``4b/g64/trellis``."""
        groups = "channel" if self.group_size == -1 else f"g{self.group_size}"
        return f"{self.bits}b/{groups}" + ("/f8" if self.scale_bits == 8 else "") + ("/trellis" if self.trellis else "")


def all_choices(bits: Sequence[int], group_sizes: Sequence[int], *, scale_bits: int = 16) -> tuple[Choice, ...]:
    """Every width with every group size, on uniform grids. ``scale_bits`` is of groups' scales: one scale a row is so
    few bytes that it keeps 16."""
    return tuple(
        Choice(
            bits=width,
            group_size=size,
            scale_bits=16 if size == -1 else scale_bits,
        )
        for width in bits
        for size in group_sizes
    )
