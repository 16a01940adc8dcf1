"""Steps of activation grids in training, and a block that computes on them.

As with scales and codes of weights (parameters), the forward computes exactly what is stored and the gradient passes
the rounding unchanged. Then a step's gradient is that of LSQ (Esser et al. 2020, arXiv:1902.08153): code less its
unrounded value inside the range, the outermost code beyond it; and activations have a gradient inside the range only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lrpq.activations.attention import POINTS, with_points
from lrpq.activations.calibrate import BlockGrids, attention_of
from lrpq.activations.grids import ActivationGrid, UniformGrid, quantized
from lrpq.model.streaming import BlockStream
from lrpq.tune.parameters import LARGEST_FACTOR, SMALLEST_FACTOR

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True, slots=True, kw_only=True)
class GridState:
    """A grid in training. Logarithmic grids stay as they are."""

    start: ActivationGrid
    shift: Float[Tensor, ""] | None
    """The step is start * (1 + shift); float32. None: not trained."""

    def export(self) -> ActivationGrid:
        """What is stored; shares no tensor that training changes."""
        if self.shift is None or not isinstance(self.start, UniformGrid):
            return self.start
        scale, offset = _moved(self.start, self.shift.detach())
        return UniformGrid(bits=self.start.bits, scale=scale, offset=offset)

    def __call__(self, x: Float[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
        """``x`` on the grid as it would be stored now, with gradients."""
        if self.shift is None or not isinstance(self.start, UniformGrid):
            return quantized(x.detach(), self.start) + (x - x.detach())
        scale, offset = _moved(self.start, self.shift)
        v = ((x - offset) / scale).clamp(0, 2**self.start.bits - 1)
        codes = v.detach().round() + (v - v.detach())  # the bracket is zero, and has the gradient
        y: Tensor = codes * scale + offset
        return y.to(x.dtype)

    @torch.no_grad()
    def project(self) -> None:
        """Bring the step back into the range of what can be stored."""
        if self.shift is not None:
            self.shift.clamp_(SMALLEST_FACTOR - 1, LARGEST_FACTOR - 1)


def grid_state(grid: ActivationGrid) -> GridState:
    """Training state that stands for exactly ``grid``."""
    uniform = isinstance(grid, UniformGrid)
    device = grid.scale.device if isinstance(grid, UniformGrid) else None
    return GridState(start=grid, shift=torch.zeros((), device=device).requires_grad_() if uniform else None)


def _moved(start: UniformGrid, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Step and offset. An offset that is a whole number of steps remains one, so that zero remains a value: to the bit,
    or the grid could not be stored as a step and a zero point (lrpq.checkpoint.activations)."""
    scale, steps = start.scale * (1 + shift), (start.offset / start.scale).round()
    return scale, torch.where(steps * start.scale == start.offset, steps * scale, start.offset)


@contextmanager
def on_grids(
    stream: BlockStream, index: int, block: nn.Module, states: Mapping[str, GridState], drop: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Inside, a block's layers and attention read activations on grids in training.

    Args:
        stream: the model.
        index: of the block.
        block: whatever weights it computes with.
        states: by site and point.
        drop: of a tensor, which of its entries stay as they are.
    """

    def on(state: GridState) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.where(drop(x), x, state(x))

    def hook(state: GridState) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        return lambda _, arguments: (on(state)(arguments[0]), *arguments[1:])

    handles = [
        block.get_submodule(stream.local_name(spec)).register_forward_pre_hook(hook(states[spec.input_site]))
        for spec in stream.block_specs(index)
        if spec.input_site in states
    ]
    points = {point: on(states[point]) for point in POINTS if point in states}
    try:
        with with_points(attention_of(stream, block), points):
            yield
    finally:
        for handle in handles:
            handle.remove()


def grid_states(grids: BlockGrids) -> dict[str, GridState]:
    """Of a block."""
    return {name: grid_state(grid) for name, grid in grids.items()}
