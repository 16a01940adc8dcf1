"""What is trained of one layer and of one vector: numbers beside the stored ones, and the stored ones they stand for.

Training sees exactly what will be stored: the forward runs on rounded scales, codes and vectors, and the gradient
passes the rounding unchanged (straight-through estimator, Bengio et al. 2013, arXiv:1308.3432; of codes as in LSQ,
Esser et al. 2020, arXiv:1902.08153). The chain from a dense weight's gradient to the trained numbers is short and
linear, so it is written out here and runs once a step, in float32, whatever number of micro-batches made the gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrpq.errors import QuantizationError
from lrpq.model.layers import Choice
from lrpq.quant.grid import QuantizedWeight, code_range
from lrpq.quant.stored_scales import nearest
from lrpq.relevance.passes import widen
from lrpq.tune.options import Trained

if TYPE_CHECKING:
    from jaxtyping import BFloat16, Float, Int8

SMALLEST_FACTOR, LARGEST_FACTOR = 0.1, 10.0
"""Bounds of a trained scale over the one it started from: no scale changes its sign, vanishes or overflows."""

MARGIN = 0.01
"""Least distance of a latent from the border of its cell where training starts, in steps of the grid: rounding in
float32 must give the code it stands for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearState:
    """A quantized layer in training. Its trained tensors change in place; the start does not."""

    name: str
    """Module name, for errors."""
    choice: Choice
    start_codes: Int8[Tensor, "d_out d_in"]
    start_scales: BFloat16[Tensor, "d_out groups"]
    shift: Float[Tensor, "d_out groups"] | None
    """A scale is start * (1 + shift); float32. None: not trained."""
    latent: Float[Tensor, "d_out d_in"] | None
    """A code is the nearest integer; float32, in steps of the grid. None: not trained."""

    def scales(self) -> BFloat16[Tensor, "d_out groups"]:
        """Scales as stored."""
        if self.shift is None:
            return self.start_scales
        return nearest(self.start_scales.float() * (1 + self.shift.detach()), self.choice.scale_bits).bfloat16()

    def codes(self) -> Int8[Tensor, "d_out d_in"]:
        """Codes as stored."""
        return self.start_codes if self.latent is None else self.latent.detach().round().to(torch.int8)

    def export(self) -> QuantizedWeight:
        """What is stored; shares no tensor that training changes."""
        return QuantizedWeight(codes=self.codes(), scales=self.scales(), choice=self.choice)

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "d_out d_in"]:
        """The weight as it is computed from what is stored."""
        return self.export().dequantize(dtype, name=self.name)

    @torch.no_grad()
    def set_gradients(self, dW: Float[Tensor, "d_out d_in"]) -> None:
        """Gradients of the trained tensors, from that of the dense weight (float32)."""
        d_out, groups = self.start_scales.shape
        by_group = dW.view(d_out, groups, -1)
        if self.shift is not None:
            codes = self.codes().view(d_out, groups, -1)
            self.shift.grad = (by_group * codes).sum(-1).mul_(self.start_scales).to(self.shift.dtype)
        if self.latent is not None:
            self.latent.grad = (by_group * self.scales().unsqueeze(-1)).view_as(self.latent).to(self.latent.dtype)

    @torch.no_grad()
    def project(self) -> None:
        """Bring the trained tensors back into the range of what can be stored."""
        if self.shift is not None:
            self.shift.clamp_(SMALLEST_FACTOR - 1, LARGEST_FACTOR - 1)
        if self.latent is not None:
            self.latent.clamp_(*code_range(self.choice.bits))

    def tensors(self) -> Iterator[Tensor]:
        """All tensors that the layer's training holds."""
        yield from (t for t in (self.start_codes, self.start_scales, self.shift, self.latent) if t is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorState:
    """A norm's gain or a bias in training."""

    name: str
    """Name of the parameter in the whole model."""
    start: Float[Tensor, "values=width"]
    """In the dtype in which it is stored."""
    unit: float
    """Root mean square of the start, so that one learning rate serves all vectors; 1 where the start is zero."""
    shift: Float[Tensor, "values=width"]
    """The vector is start + unit * shift; float32."""

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "values=width"]:
        """The vector as stored, in the dtype that computes."""
        return self.export().to(dtype)

    def export(self) -> Float[Tensor, "values=width"]:
        """What is stored; shares no tensor that training changes."""
        return (widen(self.start) + self.unit * self.shift.detach()).to(self.start.dtype)

    @torch.no_grad()
    def set_gradients(self, dv: Float[Tensor, "values=width"]) -> None:
        """Gradient of the trained tensor, from that of the vector."""
        self.shift.grad = (self.unit * dv).to(self.shift.dtype)

    def tensors(self) -> Iterator[Tensor]:
        """All tensors that the vector's training holds."""
        yield from (self.start, self.shift)


def linear_state(
    start: QuantizedWeight, original: Float[Tensor, "d_out d_in"], trained: Trained, *, name: str
) -> LinearState:
    """Training state that stands for exactly ``start``.

    A latent starts where the original weight lies in the cell of its code, so that what was close to another code
    changes first. Where GPTQ has carried other columns' errors into a weight, the original can lie outside the cell and
    says nothing: there the latent starts in the middle. All in the middle would change together, in the step in which
    Adam's equal strides have added up to half a cell.

    Raises:
        QuantizationError: the layer has zero points, which nothing here moves.
    """
    if start.zero_points is not None:
        raise QuantizationError(f"{name}: has zero points; tuning knows signed and symmetric grids only")
    return LinearState(
        name=name,
        choice=start.choice,
        # tensors of their own on the same memory: moving these to a device does not move the caller's
        start_codes=start.codes.detach(),
        start_scales=start.scales.detach(),
        shift=torch.zeros_like(start.scales, dtype=torch.float32).requires_grad_()
        if Trained.SCALES in trained
        else None,
        latent=_latent(start, original).requires_grad_() if Trained.CODES in trained else None,
    )


def _latent(start: QuantizedWeight, original: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
    codes = start.codes.float()
    scales = start.scales.float().repeat_interleave(codes.shape[1] // start.scales.shape[1], dim=1)
    offset = original.to(codes) / scales - codes
    offset = torch.where(offset.abs() > 0.5, 0.0, offset.clamp(MARGIN - 0.5, 0.5 - MARGIN))
    return (codes + offset).clamp_(*code_range(start.choice.bits))


def vector_state(start: Float[Tensor, "values=width"], *, name: str) -> VectorState:
    """Training state that stands for exactly ``start``."""
    size = float(widen(start).square().mean().sqrt())
    return VectorState(
        name=name,
        start=start.detach(),
        unit=size if size > 0 else 1.0,
        shift=torch.zeros_like(start, dtype=torch.float32).requires_grad_(),
    )
