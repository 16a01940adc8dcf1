"""What is known of a module when its block has been walked back: the input of every measure of importance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from lrpq.model.layers import LinearSpec
from lrpq.quant.factor import Factor
from lrpq.quant.grid import Grid, QuantizedWeight
from lrpq.relevance.rules import Pass

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleEvidence:
    """One linear layer. Means over the calibration tokens; gradients are those of the loss summed over tokens."""

    spec: LinearSpec
    W: Float[Tensor, "d_out d_in"]
    candidates: Sequence[QuantizedWeight]
    """By GPTQ on the run's Hessian, one for each choice."""
    rounded: Sequence[QuantizedWeight]
    """By rounding to the nearest, for the same choices; empty where no measure asked for them."""
    factor: Factor
    """Of the run's Hessian."""
    grid: Grid
    """Of the candidates."""
    hessians: Mapping[str, Float[Tensor, "d_in d_in"]]
    """Name of a token weighting -> H of the module's site, fp32."""
    curvature: Mapping[Pass, Float[Tensor, " d_out"]]
    """mean_t g_tj^2 of each pass (float64), nats per unit of output squared."""
    trace: float
    """mean_t |g_t|^2 |x_t|^2 of the Fisher pass: trace of the Fisher information of W, nats per unit of weight
    squared."""
    bounded_trace: float
    """The same, no window counting for more than four times the median one (lrpq.quant.matched_curvature)."""
    relevance: float
    """mean_t sum_j |y_tj g_tj| of the LRP pass, nats; 0 where no such pass ran."""
    gradient_change: Sequence[float] | None = None
    """sum |G o dW| of each of ``rounded``, G = mean_t g_t x_t^T with the text's own tokens as labels; nats."""
    output_error: Sequence[float] | None = None
    """mean_t sum_j g_tj^2 (dy_tj)^2 of each of ``rounded``, labels as before; nats."""
    block_cosine: float | None = 0.0
    """mean_t cos(block input, block output) of the module's block; None where a block makes other tokens."""


Costs = Callable[[ModuleEvidence], list[float]]
"""Cost of every candidate, in the order of the choices; only ratios matter unless the measure says nats."""
Score = Callable[[ModuleEvidence], float]
"""Importance; higher is more important."""
