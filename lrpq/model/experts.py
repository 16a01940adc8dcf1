"""Mixture-of-experts layers with a linear layer for every expert and projection.

transformers 5 keeps the experts of a block as two 3-D parameters. What a hook, a Hessian or a bit width belongs to is a
layer, so while a model is streamed they are replaced by `LinearExperts`: the same loop over the experts that are hit,
in the same order, with the same products (transformers' ``eager`` implementation, bit for bit).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lrpq.errors import ModelError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

GATE_UP, DOWN = "gate_up_proj", "down_proj"


class RoutedLinear(nn.Linear):
    """A linear layer of an expert; it knows which tokens it is being run on."""

    rows: Tensor | None = None
    """Indices of the tokens, in the order of the layer's inputs, of the last forward; None where it got none."""


class Expert(nn.Module):
    """Gate and up projection as one layer [2i, h], and the down projection [h, i]."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_up_proj = RoutedLinear(hidden, 2 * intermediate, bias=False)
        self.down_proj = RoutedLinear(intermediate, hidden, bias=False)


class LinearExperts(nn.Module):
    """Experts named ``0``, ``1``, ...: the forward of transformers' experts on layers of their own."""

    def __init__(self, num_experts: int, hidden: int, intermediate: int, activation: nn.Module) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.act_fn = activation
        for index in range(num_experts):
            self.add_module(str(index), Expert(hidden, intermediate))

    def forward(
        self,
        hidden_states: Float[Tensor, "tokens h"],
        top_k_index: Int[Tensor, "tokens k"],
        top_k_weights: Float[Tensor, "tokens k"],
    ) -> Float[Tensor, "tokens h"]:
        """Sum over the experts that a token is sent to, weighted by the router."""
        output = torch.zeros_like(hidden_states)
        with torch.no_grad():
            mask = nn.functional.one_hot(top_k_index, num_classes=self.num_experts).permute(2, 1, 0)
            hit = mask.sum(dim=(-1, -2)).nonzero().flatten().tolist()
        for child in self.children():
            if isinstance(child, Expert):
                child.gate_up_proj.rows = child.down_proj.rows = None
        for index in hit:
            expert = cast(Expert, self._modules[str(index)])
            position, rows = torch.where(mask[index])
            expert.gate_up_proj.rows = expert.down_proj.rows = rows
            gate, up = expert.gate_up_proj(hidden_states[rows]).chunk(2, dim=-1)
            y = expert.down_proj(self.gated(gate, up))
            output.index_add_(0, rows, self.weighted(y, top_k_weights[rows, position, None]).to(output.dtype))
        return output

    def gated(self, gate: Float[Tensor, "n i"], up: Float[Tensor, "n i"]) -> Float[Tensor, "n i"]:
        """Activation of the gate times the value."""
        return cast(Tensor, self.act_fn(gate) * up)

    def weighted(self, y: Float[Tensor, "n h"], weight: Float[Tensor, "n 1"]) -> Float[Tensor, "n h"]:
        """An expert's output times its router weight."""
        return y * weight


def replace_experts(block: nn.Module, path: str, *, name: str) -> LinearExperts | None:
    """Replace the experts' parameters at ``path`` of a block by layers; None if the block has no experts.

    Raises:
        ModelError: the experts are not gate, up and down projections without biases.
    """
    try:
        module: Any = block.get_submodule(path)
    except AttributeError:
        return None
    shapes = {key: tuple(p.shape) for key, p in module.named_parameters(recurse=False)}
    if set(shapes) != {GATE_UP, DOWN} or any(len(shape) != 3 for shape in shapes.values()):
        raise ModelError(f"{name}.{path}: expected 3-D parameters {GATE_UP} and {DOWN}, found {shapes}")
    num_experts, hidden, intermediate = shapes[DOWN]
    if shapes[GATE_UP] != (num_experts, 2 * intermediate, hidden):
        raise ModelError(f"{name}.{path}: {GATE_UP} is {shapes[GATE_UP]}, {DOWN} is {shapes[DOWN]}: not a gated MLP")
    dtype = next(module.parameters()).dtype
    with torch.device("meta"):
        experts = LinearExperts(num_experts, hidden, intermediate, module.act_fn).to(dtype)
    experts.eval().requires_grad_(False)
    block.set_submodule(path, experts)
    return experts


def loaded_weight(model: nn.Module, name: str) -> Float[Tensor, "d_out d_in"]:
    """Weight of the module ``name`` in a model as transformers loads it: a layer's, or a slice of the experts'.

    Raises:
        AttributeError: the model has no such module.
    """
    try:
        return cast(Tensor, model.get_submodule(name).weight)
    except AttributeError:
        parts = name.split(".")
        if len(parts) < 3 or not parts[-2].isdigit():
            raise
        fused: Tensor = getattr(model.get_submodule(".".join(parts[:-2])), parts[-1])
        return fused[int(parts[-2])]


def expert_tensors(
    stem: str, num_experts: int, *, gate_up: tuple[str, str], down: str
) -> Mapping[str, tuple[str, ...]]:
    """Weight of every expert's layer -> tensors on disk that make its rows; ``stem`` names the experts' module."""
    found: dict[str, tuple[str, ...]] = {}
    for e in range(num_experts):
        found[f"{stem}.{e}.{GATE_UP}.weight"] = tuple(f"{stem}.{e}.{part}.weight" for part in gate_up)
        found[f"{stem}.{e}.{DOWN}.weight"] = (f"{stem}.{e}.{down}.weight",)
    return found
