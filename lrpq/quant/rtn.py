"""Round to nearest: every weight to the closest code, no correction. The floor that GPTQ must beat."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrpq.errors import QuantizationError
from lrpq.model.layers import Choice
from lrpq.quant.grid import (
    Grid,
    QuantizedWeight,
    absmax_scales,
    check_finite,
    code_range,
    group_width,
    zero_points,
)
from lrpq.quant.scale_search import search_scales

if TYPE_CHECKING:
    from jaxtyping import Float


def round_to_nearest(
    W: Float[Tensor, "d_out d_in"],
    choice: Choice,
    *,
    importance: Float[Tensor, "columns=d_in"] | None = None,
    grid: Grid = Grid.SYMMETRIC,
    name: str = "layer",
) -> QuantizedWeight:
    """Quantize W without calibration: absmax scales, or searched ones where ``importance`` (diag H) is given.

    Grids other than SYMMETRIC always search (with equal importance if none is given).
    Raises QuantizationError for weights that are not finite or a group size that does not divide d_in.
    """
    if choice.trellis:
        raise QuantizationError(f"{name}: {choice} has no nearest code; rounding to nearest is of uniform codes")
    check_finite(W, "weight", name=name)
    d_out, d_in = W.shape
    width = group_width(choice, d_in, name=name)
    bottom, top = code_range(choice.bits)
    if importance is None and grid is Grid.SYMMETRIC:
        scales = absmax_scales(W, choice)
    else:
        weights = torch.ones(d_in, device=W.device) if importance is None else importance
        scales = search_scales(W, weights, choice, grid=grid, name=name)
    zeros = zero_points(W, choice) if grid is Grid.ASYMMETRIC else None
    dtype = torch.float64 if W.dtype == torch.float64 else torch.float32
    steps = W.to(dtype).view(d_out, d_in // width, width) / scales.to(dtype).unsqueeze(-1)
    if zeros is not None:
        steps += zeros.to(dtype).unsqueeze(-1)
    codes = steps.round_().clamp_(bottom, top).to(torch.int8).view(d_out, d_in)
    return QuantizedWeight(codes=codes, scales=scales, choice=choice, zero_points=zeros)
