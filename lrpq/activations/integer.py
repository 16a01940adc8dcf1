"""A linear layer in integer arithmetic, simulated with floating-point products that are exact.

    y = s_x s_w (W_q q) + b',   b' = b + o W^ 1

with codes q of the inputs on a uniform grid x^ = s_x q + o (one step for the tensor), codes W_q of the weights with one
scale s_w a row, and W^ = s_w W_q. The sum W_q q is one of whole numbers. In float32 products and sums of whole numbers
are exact as long as no partial sum reaches 2^24, in whatever order they are added; beyond that bound the product runs
in float64. So the result equals that of integer hardware, bit for bit, if it applies scale and bias in float32 as here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lrpq.activations.grids import UniformGrid
from lrpq.errors import QuantizationError
from lrpq.quant.grid import QuantizedWeight

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

_EXACT = 1 << 24
"""Whole numbers up to here are exact in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegerLinear:
    """What a layer needs besides the codes of its inputs."""

    W_q: Float[Tensor, "d_out d_in"]
    """Weight codes as whole numbers in the dtype whose products are exact here."""
    scale: Float[Tensor, " d_out"]
    """s_x s_w, float32."""
    bias: Float[Tensor, " d_out"]
    """b', float32."""
    grid: UniformGrid
    """Of the inputs."""

    def __call__(self, x: Float[Tensor, "*tokens d_in"]) -> Float[Tensor, "*tokens d_out"]:
        """Quantize the inputs, multiply, rescale; the result has the dtype of ``x``."""
        return self.rescaled(self.accumulated(self.grid.codes(x))).to(x.dtype)

    def accumulated(self, codes: Int[Tensor, "*tokens d_in"]) -> Int[Tensor, "*tokens d_out"]:
        """W_q q, as whole numbers."""
        return torch.nn.functional.linear(codes.to(self.W_q.dtype), self.W_q)

    def rescaled(self, accumulated: Int[Tensor, "*tokens d_out"]) -> Float[Tensor, "*tokens d_out"]:
        """From sums of whole numbers, of any dtype, to outputs in float32."""
        y: Tensor = accumulated.float() * self.scale + self.bias
        return y


def integer_linear(weight: QuantizedWeight, bias: Tensor | None, grid: UniformGrid, *, name: str) -> IntegerLinear:
    """Prepare a layer.

    Raises:
        QuantizationError: the weights have more than one scale a row, zero points, or the inputs more than one step.
    """
    if weight.scales.shape[1] != 1 or weight.zero_points is not None:
        raise QuantizationError(
            f"{name}: integer arithmetic needs one scale a row and no zero points, got {weight.choice}; quantize it "
            "with group size -1"
        )
    if grid.per_channel:
        raise QuantizationError(f"{name}: its inputs have a step a channel; fold them into the norm before it")
    d_in = weight.codes.shape[1]
    exact = d_in * 2 ** (weight.choice.bits - 1) * (2**grid.bits - 1) < _EXACT
    s_w = weight.scales[:, 0].float()
    W_q = weight.codes.to(torch.float32 if exact else torch.float64)
    shift = grid.offset.float() * (s_w * weight.codes.to(torch.int64).sum(1).float())
    return IntegerLinear(
        W_q=W_q, scale=s_w * grid.scale.float(), bias=shift if bias is None else bias.float() + shift, grid=grid
    )
