"""``config.json`` of a checkpoint: the original's, and what is quantized how."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lrpq.checkpoint.activations import SECTION, StoredActivations
from lrpq.checkpoint.formats import FORMATS, CheckpointFormat
from lrpq.checkpoint.modules import WEIGHT
from lrpq.checkpoint.patterns import expert_patterns, natural_key
from lrpq.errors import ConfigError, ModelError
from lrpq.model.experts import loaded_weight
from lrpq.model.hidden_type import hidden
from lrpq.model.layers import Choice, LinearSpec
from lrpq.model.names import stored_names
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.skeleton import build_skeleton


def config_text(
    source: ModelSource,
    choices: Mapping[str, Choice],
    specs: Sequence[LinearSpec] = (),
    format: CheckpointFormat = CheckpointFormat.COMPRESSED_TENSORS,
    activations: StoredActivations | None = None,
) -> str:
    """Contents of ``config.json``.

    Raises:
        ConfigError: grids of activations for a format that has no place for them.
        ModelError: a module to quantize is no linear layer of the model, or transformers cannot build the model.
    """
    model = _empty_model(source)
    _check_linear(model, source, choices, specs)
    document = source.config_document()
    packed_experts = any(spec.routed and spec.name in choices for spec in specs)
    if packed_experts and format is CheckpointFormat.COMPRESSED_TENSORS:
        # transformers gives packed experts the type of their scales, whatever the rest of the model has
        document |= {"dtype": "bfloat16"}
        document.pop("torch_dtype", None)
    elif getattr(source.config, "dtype", None) is None:
        # transformers would then take the type of the first tensor in the file, which may now be a bf16 scale
        document["dtype"] = str(source.main_dtype()).removeprefix("torch.")
    ignore = _dense_names(model, source, choices, specs)
    options: dict[str, Any] = {}
    if activations is not None:
        if format is not CheckpointFormat.COMPRESSED_TENSORS:
            wanted = CheckpointFormat.COMPRESSED_TENSORS.value
            raise ConfigError(f"format {format.value}: stores no quantized activations; use {wanted}")
        options["input_bits"] = {module: grid.bits for module, grid in activations.inputs.items()}
        document[SECTION] = activations.section
    description = FORMATS[format].describe(choices, specs=specs, ignore=ignore, **options)
    if description is not None:
        document["quantization_config"] = description
    if format is CheckpointFormat.TRELLIS:
        document = hidden(document, source.config.model_type)
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def matrix_modules(model: nn.Module) -> list[str]:
    """Names of all modules that multiply by a matrix: linear layers, the head and routers, not embeddings."""
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(weight := getattr(module, "weight", None), nn.Parameter)
        and weight.ndim == 2
        and not isinstance(module, nn.Embedding)
    ]
    return sorted(found, key=natural_key)


def _empty_model(source: ModelSource) -> Any:
    return build_skeleton(source.config, dtype=torch.float32, device=torch.device("cpu"))


def _check_linear(
    model: nn.Module, source: ModelSource, choices: Mapping[str, Choice], specs: Sequence[LinearSpec]
) -> None:
    routed = {spec.name: (spec.d_out, spec.d_in) for spec in specs if spec.routed}
    modules = dict(model.named_modules())
    for name in sorted(choices, key=natural_key):
        if name in routed:
            try:
                found = tuple(loaded_weight(model, name).shape)
            except (AttributeError, IndexError) as error:
                raise ModelError(f"module {name}: is not an expert's of {source.folder} ({error})") from error
            if found != routed[name]:
                raise ModelError(f"module {name}: {list(found)} in {source.folder}, expected {list(routed[name])}")
        elif not isinstance(modules.get(name), nn.Linear):
            raise ModelError(f"module {name}: is not a linear layer of {source.folder}; only those can be quantized")


def _dense_names(
    model: Any, source: ModelSource, choices: Mapping[str, Choice], specs: Iterable[LinearSpec]
) -> list[str]:
    """Names of what stays dense, as the loaded model has them and as they are on disk."""
    stored = stored_names(model, source)
    ignored: set[str] = set()
    for name in matrix_modules(model):
        if name not in choices:
            ignored |= {name, stored.get(name + WEIGHT, name).removesuffix(WEIGHT)}
    for spec in specs:
        if spec.routed and spec.name not in choices:
            ignored |= {f"re:^{pattern}$" for pattern in expert_patterns(spec)}
    return sorted(ignored)
