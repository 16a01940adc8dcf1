"""A model without weights: every module at its place, parameters on the meta device, computed buffers real."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel

from lrpq.errors import ModelError
from lrpq.model.families import classifies_images


def build_skeleton(
    config: PreTrainedConfig, *, dtype: torch.dtype, device: torch.device, attention: str | None = None
) -> Any:
    """The model of a configuration, in evaluation mode.

    Args:
        config: its configuration.
        dtype: dtype of the parameters.
        device: where computed buffers (rotary frequencies, embedding scales) are.
        attention: attention implementation; by default transformers' own choice for this model (a model whose
            attention scores are capped has no fused kernel, for instance).

    Raises:
        ModelError: transformers cannot build the model from the configuration.
    """
    images = classifies_images(config)
    auto = AutoModelForImageClassification if images else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            model = auto.from_config(
                deepcopy(config), dtype=dtype, attn_implementation=attention, trust_remote_code=False
            )
    except Exception as error:  # whatever a model's constructor raises is a bad configuration
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        wanted = "image classifier" if images else "causal language model"
        raise ModelError(f"config.json: transformers builds no {wanted} from it ({reason})") from error
    model.eval().requires_grad_(False)
    _compute_buffers(model, device)
    return model


@torch.no_grad()
def _compute_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Give real values to buffers that are computed, not stored, by the model's own initialisation."""
    owner: dict[str, PreTrainedModel] = {}
    for path, module in model.named_modules():
        parent = owner.get(path.rpartition(".")[0], model)
        owner[path] = module if isinstance(module, PreTrainedModel) else parent
        computed = [name for name in module._non_persistent_buffers_set if getattr(module, name) is not None]
        if not computed:
            continue
        for name in computed:
            buffer = getattr(module, name)
            missing = float("nan") if buffer.is_floating_point() else 0
            setattr(module, name, torch.full_like(buffer, missing, device=device))
        owner[path]._init_weights(module)
        for name in computed:
            buffer = getattr(module, name)
            if buffer.is_meta or (buffer.is_floating_point() and bool(torch.isnan(buffer).any())):
                raise ModelError(f"module {path}: its buffer {name} is computed, and transformers does not say how")


def own_modules(model: nn.Module, paths: Sequence[str], optional: Collection[str] = ()) -> tuple[str, ...]:
    """Those of ``paths`` that the model has.

    Raises:
        ModelError: one that is not optional is missing.
    """
    modules = dict(model.named_modules())
    found = tuple(path for path in paths if path in modules)
    missing = [path for path in paths if path not in modules and path not in optional]
    if missing:
        raise ModelError(
            f"module {missing[0]}: not in the {type(model).__name__} that config.json describes; its architectures and "
            "its model_type do not fit each other"
        )
    return found
