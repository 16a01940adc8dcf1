"""Propagation rules, one named function each, written as gradients that a switch changes while backward runs.

Relevance of a tensor is its value times a *modified* gradient (gradient x input), so a rule of layer-wise
relevance propagation is a change of the backward formula of one operation. Here the change is decided when
the backward pass runs, not when the graph is built: every function reads `PassSwitch.current` then. One
recomputed forward then serves the true gradient and every relevance pass, and its values are those of the
unpatched model bit for bit, because no rule touches the forward arithmetic.

    operation               FISHER           LRP (AttnLRP)                CP_LRP
    linear, addition        true gradient    true gradient (0-LRP)        true gradient (0-LRP)
    normaliser of a norm    true gradient    constant                     constant
    y = act(z)              true gradient    g y/z (identity rule)        g y/z
    gate * value            true gradient    half to each                 all to the value, gate constant
    expert * router weight  true gradient    half to each; the router's   all to the expert, weight
                                             softmax keeps its own        constant
                                             gradient
    attention               true gradient    q, k: 1/4; v: 1/2; softmax   v: 1; q and k constant
                                             and soft cap keep their own
                                             gradient

Sources: Achtibat et al. 2024 (AttnLRP; gradient form as in their LXT), Ali et al. 2022 (constant normaliser,
CP-LRP), Jafari et al. 2025 (RelP: the same coefficients). LRP is covered by a patent of its inventors, and
LXT's licence note limits free use to personal and scientific work; the FISHER pass uses none of these rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from jaxtyping import Float

# Small against any activation that carries relevance: act(z)/z is exact for |z| >> 1e-9. It bounds the slope
# only of activations with act(0) != 0; silu, gelu and relu have |act(z)| <= |z|, a slope of at most one.
EPSILON = 1e-9


class Pass(Enum):
    """Which gradient a backward pass computes."""

    FISHER = "fisher"
    """The true gradient."""
    LRP = "lrp"
    """AttnLRP: softmax, gates and products share the relevance."""
    CP_LRP = "cp-lrp"
    """Attention pattern and gates are constants; conserves relevance exactly in a model without biases."""


@dataclass(slots=True)
class PassSwitch:
    """Says which pass is running. Mutable on purpose: the functions of a graph keep it and read it later."""

    current: Pass = Pass.FISHER

    @contextmanager
    def running(self, running: Pass) -> Iterator[None]:
        """Backward passes inside the scope follow ``running``; the former pass is set again on leaving."""
        former, self.current = self.current, running
        try:
            yield
        finally:
            self.current = former


def stabilize(z: Float[Tensor, "*dims"], epsilon: float = EPSILON) -> Float[Tensor, "*dims"]:
    """Move ``z`` away from zero by ``epsilon`` in the direction of its sign, with sign(0) = +1.

    An unsigned epsilon has a pole at z = -epsilon; sign(0) = 0 would leave the division by zero. The offset
    is at least the smallest normal number of the dtype, since 1e-9 is zero in float16.
    """
    offset = max(epsilon, torch.finfo(z.dtype).tiny)
    # copysign is ten times as fast as where on bf16; adding 0.0 turns -0.0 into +0.0, whose sign is wanted
    return z + torch.copysign(z.new_full((), offset), z + 0.0)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_true: Tensor, y_rule: Tensor, switch: PassSwitch) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.switch = switch
        return y_true.view_as(y_true)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        (g,) = gradients
        return (g, None, None) if ctx.switch.current is Pass.FISHER else (None, g, None)


def route(y_true: Float[Tensor, "*dims"], y_rule: Float[Tensor, "*dims"], switch: PassSwitch) -> Float[Tensor, "*dims"]:
    """Return ``y_true``; the gradient goes to ``y_true`` in the FISHER pass, to ``y_rule`` in the others."""
    return cast(Tensor, _Route.apply(y_true, y_rule, switch))  # type: ignore[no-untyped-call]


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factors: Mapping[Pass, float], switch: PassSwitch) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.factors, ctx.switch = factors, switch
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None]:
        (g,) = gradients
        factor = ctx.factors.get(ctx.switch.current, 1.0)
        # None, not zeros: autograd then skips the work of the branch below.
        if g is None or factor == 0.0:
            return None, None, None
        return (g if factor == 1.0 else g * factor), None, None


def scale_gradient(
    x: Float[Tensor, "*dims"], factors: Mapping[Pass, float], switch: PassSwitch
) -> Float[Tensor, "*dims"]:
    """Return ``x``; its gradient is multiplied by ``factors[pass]``, by one where the pass is not named.

    A factor of 0 detaches: nothing below is computed in that pass.
    """
    return cast(Tensor, _Scale.apply(x, factors, switch))  # type: ignore[no-untyped-call]


CONSTANT: Mapping[Pass, float] = {Pass.LRP: 0.0, Pass.CP_LRP: 0.0}
# Two products, each split in halves: v takes half of (pattern @ v); q and k half each of the pattern's half.
QUERY_KEY: Mapping[Pass, float] = {Pass.LRP: 0.25, Pass.CP_LRP: 0.0}
VALUE: Mapping[Pass, float] = {Pass.LRP: 0.5}


def stop_gradient(x: Float[Tensor, "*dims"], switch: PassSwitch) -> Float[Tensor, "*dims"]:
    """Return ``x``, a constant for the relevance passes and itself for the FISHER pass."""
    return scale_gradient(x, CONSTANT, switch)


class _Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, switch: PassSwitch) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.switch = switch
        ctx.save_for_backward(y, z)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        (g,) = gradients
        if g is None or ctx.switch.current is Pass.FISHER:
            return g, None, None
        y, z = ctx.saved_tensors
        return None, g * (y / stabilize(z)), None


def identity_rule(
    activation: Callable[[Tensor], Tensor], z: Float[Tensor, "*dims"], switch: PassSwitch
) -> Float[Tensor, "*dims"]:
    """Elementwise activation as z * stop(act(z)/z): relevance passes unchanged (AttnLRP, identity rule)."""
    return cast(Tensor, _Identity.apply(activation(z), z, switch))  # type: ignore[no-untyped-call]


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, value: Tensor, switch: PassSwitch) -> Tensor:
        ctx.switch = switch
        ctx.save_for_backward(gate, value)
        return gate * value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (g,) = gradients
        gate, value = ctx.saved_tensors
        if ctx.switch.current is Pass.CP_LRP:
            return None, g * gate, None
        if ctx.switch.current is Pass.LRP:
            g = g * 0.5  # a power of two: exact in every dtype
        return g * value, g * gate, None


def half_product(
    gate: Float[Tensor, "*dims"], value: Float[Tensor, "*dims"], switch: PassSwitch
) -> Float[Tensor, "*dims"]:
    """``gate * value`` of equal shapes; LRP: half the relevance to each; CP_LRP: the gate is a constant."""
    return cast(Tensor, _GatedProduct.apply(gate, value, switch))  # type: ignore[no-untyped-call]


# One product, split in halves; under CP_LRP the expert's output takes all.
EXPERT_OUTPUT: Mapping[Pass, float] = {Pass.LRP: 0.5}
ROUTER_WEIGHT: Mapping[Pass, float] = {Pass.LRP: 0.5, Pass.CP_LRP: 0.0}


def routed_product(
    y: Float[Tensor, "rows h"], weight: Float[Tensor, "rows 1"], switch: PassSwitch
) -> Float[Tensor, "rows h"]:
    """``y * weight``, expert outputs by router weights; LRP: half to each; CP_LRP: the weight is a constant.

    LRP is the uniform rule for products of Achtibat et al. 2024, applied to experts as in their LXT (qwen3_moe). CP_LRP
    is ours, by analogy with a gate: LXT has none for experts. Dtypes may differ (Mixtral's weights are float32): the
    product promotes, as the model's own does.
    """
    return scale_gradient(y, EXPERT_OUTPUT, switch) * scale_gradient(weight, ROUTER_WEIGHT, switch)


def _norm_dtype(dtype: torch.dtype) -> torch.dtype:
    """Transformers normalises in float32 whatever comes in; float64 is kept here, for the reference tests."""
    return torch.promote_types(dtype, torch.float32)


def rms_norm(x: Float[Tensor, "... h"], weight: Tensor, epsilon: float, switch: PassSwitch) -> Float[Tensor, "... h"]:
    """``weight * x / rms(x)`` with a constant rms; order of operations and casts of LlamaRMSNorm."""
    x_wide = x.to(_norm_dtype(x.dtype))
    scale = torch.rsqrt(x_wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * (x_wide * stop_gradient(scale, switch)).to(x.dtype)


def rms_norm_unit_offset(
    x: Float[Tensor, "... h"], weight: Tensor, epsilon: float, switch: PassSwitch
) -> Float[Tensor, "... h"]:
    """``(1 + weight) * x / rms(x)`` with a constant rms; order of operations and casts of GemmaRMSNorm."""
    wide = _norm_dtype(x.dtype)
    x_wide = x.to(wide)
    scale = torch.rsqrt(x_wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return (x_wide * stop_gradient(scale, switch) * (1.0 + weight.to(wide))).type_as(x)


def layer_norm(
    x: Float[Tensor, "... h"],
    weight: Tensor | None,
    bias: Tensor | None,
    epsilon: float,
    switch: PassSwitch,
) -> Float[Tensor, "... h"]:
    """LayerNorm over the last axis; standard deviation constant, subtraction of the mean differentiated.

    PyTorch's fused kernel gives the values (no written-out form matches it bit for bit), a second,
    written-out branch the relevance gradient.
    """
    y_true = functional.layer_norm(x, (x.shape[-1],), weight, bias, epsilon)
    x_wide = x.to(_norm_dtype(x.dtype))
    centred = x_wide - x_wide.mean(-1, keepdim=True)
    scale = torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + epsilon).detach()
    y_rule = (centred * scale).to(x.dtype)
    y_rule = y_rule if weight is None else y_rule * weight
    return route(y_true, y_rule, switch)
