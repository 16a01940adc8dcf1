"""Running several backward passes through one graph."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from lrpq.errors import QuantizationError
from lrpq.relevance.composite import COMPOSITE, apply_rules
from lrpq.relevance.operations import operation_rules
from lrpq.relevance.rules import Pass, PassSwitch


def has_rule_table(module: nn.Module) -> bool:
    """Whether every class in ``module`` has a row in `COMPOSITE`; otherwise rules are found operation by operation."""
    return all(type(member) in COMPOSITE for member in module.modules())


def rules_for(module: nn.Module, switch: PassSwitch, passes: Collection[Pass]) -> AbstractContextManager[None]:
    """The scope of the rules, where a pass other than FISHER needs them: by module, else by operation."""
    if set(passes) == {Pass.FISHER}:
        return nullcontext()
    return apply_rules(module, switch) if has_rule_table(module) else operation_rules(module, switch)


def run_passes(output: Tensor, leaf: Tensor, upstream: Mapping[Pass, Tensor], switch: PassSwitch) -> dict[Pass, Tensor]:
    """Gradients at ``leaf``; the last pass frees the graph."""
    gradients: dict[Pass, Tensor] = {}
    for number, (running, g) in enumerate(upstream.items(), start=1):
        with switch.running(running):
            (gradients[running],) = torch.autograd.grad(
                output, leaf, g.to(output.dtype), retain_graph=number < len(upstream)
            )
    return gradients


def widen(x: Tensor) -> Tensor:
    """At least fp32: squares and sums of bf16 values lose everything in bf16."""
    wide: Tensor = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide


def check_finite(tensors: Mapping[tuple[str, Pass], Tensor]) -> None:
    """Raise, naming the first tensor that is not finite; one transfer from the device for all."""
    finite = torch.stack([torch.isfinite(tensor).all() for tensor in tensors.values()]).tolist()
    for (name, running), good in zip(tensors, finite, strict=True):
        if not good:
            raise QuantizationError(
                f"{name}: the gradient of the {running.value} pass is not finite; load the model in bfloat16 "
                "or float32, or check its weights"
            )
