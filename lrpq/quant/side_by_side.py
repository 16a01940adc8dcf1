"""Layers that read one input, swept together where each alone would leave most of a GPU idle."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from lrpq.errors import QuantizationError
from lrpq.model.layers import Choice
from lrpq.quant.factor import Factor
from lrpq.quant.gptq import Rows, gptq
from lrpq.quant.grid import Grid, QuantizedWeight

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

STACKED_ELEMENTS = 2**24
"""Weights of layers that are swept together on a GPU: as many as 4,096 by 4,096 fill it."""


def quantize_side_by_side(
    layers: Iterable[tuple[str, Float[Tensor, "d_out d_in"]]],
    factor: Factor,
    choices: Sequence[Choice],
    *,
    grid: Grid = Grid.SYMMETRIC,
) -> Iterator[tuple[Float[Tensor, "d_out d_in"], list[QuantizedWeight]]]:
    """``gptq`` of each layer, in their order: its weights and its codes at every choice.

    On a GPU consecutive small layers share a sweep, as rows do not interact; where products are taken over more rows at
    once the last digits of targets may differ. On a CPU each has its own.

    Args:
        layers: names and weights; few are held at a time.
        factor: of the Hessian that they have in common.
        choices: of each layer.
        grid: of the codes.

    Raises:
        QuantizationError: as ``gptq``.
    """
    waiting: list[tuple[str, Tensor]] = []
    for name, W in layers:
        if waiting and sum(V.numel() for _, V in waiting) + W.numel() > STACKED_ELEMENTS:
            yield from _together(waiting, factor, choices, grid)
            waiting = []
        waiting.append((name, W))
        if not _is_gpu(W):
            yield from _together(waiting, factor, choices, grid)
            waiting = []
    if waiting:
        yield from _together(waiting, factor, choices, grid)


def _together(
    layers: Sequence[tuple[str, Tensor]], factor: Factor, choices: Sequence[Choice], grid: Grid
) -> Iterator[tuple[Tensor, list[QuantizedWeight]]]:
    weights = [W for _, W in layers]
    stacked = weights[0] if len(weights) == 1 else torch.cat(weights)
    try:
        rows = Rows(parts=[len(W) for W in weights])
        found = gptq(stacked, factor, choices, grid=grid, rows=rows, name=" + ".join(name for name, _ in layers))
    except QuantizationError:
        for name, W in layers if len(layers) > 1 else ():
            gptq(W, factor, choices, grid=grid, name=name)  # the one at fault says so under its own name
        raise
    parts = [q.split([len(W) for W in weights]) for q in found]
    for i, W in enumerate(weights):
        yield W, [of_choice[i] for of_choice in parts]


def _is_gpu(W: Tensor) -> bool:
    return W.is_cuda
