"""What a calibration of the head adds up to, where it is quantized too: it is one more layer behind the last block.

All tokens weigh the same: relevance starts at the logits, where nothing but the model's certainty tells tokens apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lrpq.model.layers import LinearSpec
from lrpq.quant.activation_sums import token_squares
from lrpq.quant.hessian import HessianSum, accumulate, empty_hessian

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(slots=True, kw_only=True)
class HeadSums:
    """Sums over the tokens seen so far; filled in place."""

    hessian: HessianSum
    """Of the head's inputs, all weights one."""
    curvature: Float[Tensor, " d_out"]
    """sum_t g_tj^2 (float64), g the gradient at the head's own outputs, before a cap: softmax - one-hot."""
    trace: Float[Tensor, " one"]
    """sum_t |g_t|^2 |x_t|^2 (float64)."""


@contextmanager
def watched_head(head: nn.Module, spec: LinearSpec, device: torch.device) -> Iterator[HeadSums]:
    """While inside, every forward of the head adds its inputs, and every backward through it its output gradients."""
    sums = HeadSums(
        hessian=empty_hessian(spec.d_in, device),
        curvature=torch.zeros(spec.d_out, dtype=torch.float64, device=device),
        trace=torch.zeros(1, dtype=torch.float64, device=device),
    )

    def add_gradient(gradient: Tensor, lengths: Tensor) -> None:
        squares = gradient.float().square().flatten(0, -2)
        sums.curvature += squares.sum(0, dtype=torch.float64)
        sums.trace += squares.sum(1).double() @ lengths

    def add_input(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        x = arguments[0].detach()
        sums.hessian = accumulate(sums.hessian, x, torch.ones(x.shape[:-1], dtype=torch.float32, device=device))
        lengths = token_squares(x.flatten(0, -2)).double()
        output.register_hook(lambda g: add_gradient(g, lengths))  # type: ignore[no-untyped-call]

    handle = head.register_forward_hook(add_input)
    try:
        yield sums
    finally:
        handle.remove()
