"""Layers and attention of a loaded classifier, as modules that stay: what lrpq.activations.apply does for a scope."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lrpq.activations.grids import ActivationGrid, UniformGrid, quantized
from lrpq.activations.integer import IntegerLinear, integer_linear
from lrpq.errors import QuantizationError
from lrpq.quant.grid import QuantizedWeight

if TYPE_CHECKING:
    from jaxtyping import Float


class QuantizedLinear(nn.Module):
    """A linear layer in integer arithmetic (`lrpq.activations.integer`), its weights kept as int8 codes.

    Args:
        weight: codes, one scale a row.
        bias: of the layer, or None.
        grid: of the inputs.
        name: of the layer, for errors.

    Raises:
        QuantizationError: see `integer_linear`.
    """

    codes: Tensor
    """int8 [d_out, d_in]."""
    scale: Tensor
    """Of the outputs, s_x s_w, float32 [d_out]."""
    bias: Tensor
    """With the share of the inputs' offset, float32 [d_out]."""
    input_scale: Tensor
    input_offset: Tensor

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, grid: UniformGrid, *, name: str) -> None:
        super().__init__()
        layer = integer_linear(weight, bias, grid, name=name)
        self.name, self.weight_bits, self.input_bits = name, weight.choice.bits, grid.bits
        self.exact_in = layer.W_q.dtype
        """Dtype in which products and sums of the codes are exact."""
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scale", layer.scale)
        self.register_buffer("bias", layer.bias)
        self.register_buffer("input_scale", grid.scale)
        self.register_buffer("input_offset", grid.offset)

    def forward(self, x: Float[Tensor, "*tokens d_in"]) -> Float[Tensor, "*tokens d_out"]:
        """Quantize the inputs, multiply and add whole numbers, rescale.

        Raises:
            QuantizationError: the module has been moved to another floating-point type.
        """
        return self.integer()(x)

    def integer(self) -> IntegerLinear:
        """The layer's arithmetic, step by step."""
        if self.scale.dtype != torch.float32:
            raise QuantizationError(
                f"{self.name}: its scales are {self.scale.dtype}, expected {torch.float32}; give load_classifier the "
                "dtype instead of moving the model to it"
            )
        grid = UniformGrid(bits=self.input_bits, scale=self.input_scale, offset=self.input_offset)
        return IntegerLinear(W_q=self.codes.to(self.exact_in), scale=self.scale, bias=self.bias, grid=grid)

    def extra_repr(self) -> str:
        """Sizes and widths."""
        d_out, d_in = self.codes.shape
        return f"in_features={d_in}, out_features={d_out}, weight_bits={self.weight_bits}, input_bits={self.input_bits}"


class GridLinear(nn.Linear):
    """A linear layer in floating point whose inputs are rounded to a grid: a logarithmic one, or weights are dense.

    Args:
        layer: weight and bias.
        grid: of the inputs.
    """

    def __init__(self, layer: nn.Linear, grid: ActivationGrid) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.grid = grid

    def forward(self, x: Float[Tensor, "*tokens d_in"]) -> Float[Tensor, "*tokens d_out"]:
        """The plain product, of the inputs' values on the grid."""
        return super().forward(quantized(x, self.grid))
