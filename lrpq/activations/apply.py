"""A block that computes with quantized activations, and with quantized weights where there are codes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

from torch import Tensor, nn

from lrpq.activations.attention import POINTS, with_points
from lrpq.activations.calibrate import BlockGrids, attention_of
from lrpq.activations.grids import ActivationGrid, UniformGrid, quantized
from lrpq.activations.integer import integer_linear
from lrpq.model.streaming import BlockStream
from lrpq.quant.grid import QuantizedWeight


@contextmanager
def quantized_block(
    stream: BlockStream, index: int, block: nn.Module, grids: BlockGrids, codes: Mapping[str, QuantizedWeight]
) -> Iterator[None]:
    """Inside, a materialised block's linear layers and attention compute on grids.

    A layer with codes whose site has a uniform grid runs in integer arithmetic; with one of both, that one is simulated
    in the model's dtype. Sites and points without a grid, and layers without codes, stay as they are.

    Args:
        stream: the model, folded where the grids ask for it.
        index: of the block.
        block: with its weights.
        grids: by site and point.
        codes: module name -> weights.

    Raises:
        QuantizationError: codes cannot be multiplied in integer arithmetic; the layer is named.
    """
    replaced: list[nn.Module] = []
    points = {point: _on(grids[point]) for point in POINTS if point in grids}
    try:
        for spec in stream.block_specs(index):
            layer = block.get_submodule(stream.local_name(spec))
            forward = _forward(layer, spec.name, grids.get(spec.input_site), codes.get(spec.name))
            if forward is not None:
                layer.forward = forward
                replaced.append(layer)
        with with_points(attention_of(stream, block), points) if points else nullcontext():
            yield
    finally:
        for layer in replaced:
            del layer.forward


@dataclass(frozen=True, slots=True, kw_only=True)
class GridActivations:
    """Quantized activations for the refinement's quantized stream (lrpq.refine.sweep.QuantizedActivations)."""

    stream: BlockStream
    grids: Sequence[BlockGrids]

    def scope(self, block: int, module: nn.Module) -> AbstractContextManager[None]:
        """Inside, the block computes on its grids; weights are whatever it has."""
        return quantized_block(self.stream, block, module, self.grids[block], {})

    def inputs(self, block: int, site: str, x: Tensor) -> Tensor:
        """On the site's grid."""
        return quantized(x, self.grids[block][site]) if site in self.grids[block] else x


def _on(grid: ActivationGrid) -> Callable[[Tensor], Tensor]:
    return lambda x: quantized(x, grid)


def _forward(
    layer: nn.Module, name: str, grid: ActivationGrid | None, weight: QuantizedWeight | None
) -> Callable[[Tensor], Tensor] | None:
    W, bias = layer.get_parameter("weight"), layer.bias
    if isinstance(bias, nn.Module):
        raise TypeError(f"{name}: its bias is a module")
    if weight is not None and isinstance(grid, UniformGrid):
        moved = QuantizedWeight(
            codes=weight.codes.to(W.device), scales=weight.scales.to(W.device), choice=weight.choice
        )
        return integer_linear(moved, bias, grid, name=name)
    dense = W if weight is None else weight.dequantize(W.dtype).to(W.device)
    if grid is None:
        return None if weight is None else lambda x: nn.functional.linear(x, dense, bias)
    return lambda x: nn.functional.linear(quantized(x, grid), dense, bias)
