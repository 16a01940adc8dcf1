"""A model of which only config.json is known: names, shapes and dtypes of its tensors, as they would lie on disk.

Everything that asks a `ModelSource` for headers works on it: the layers, their sites, the size of a checkpoint. Tensors
that are asked for are on the meta device: shapes without values.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrpq.errors import ModelError
from lrpq.model.experts import expert_tensors, replace_experts
from lrpq.model.families import CONVERTED, family_of
from lrpq.model.safetensors_source import READABLE, ModelSource, _Entry, _read_config, one_line
from lrpq.model.skeleton import build_skeleton

_NAMES = {dtype: name for name, dtype in READABLE.items()}


class DescribedModel(ModelSource):
    """A model folder in which config.json is enough.

    Args:
        folder: with the config.json.
        dtype: of the weights on disk; by default the configuration's, float32 where it names none.

    Raises:
        ModelError: no configuration that transformers and lrpq read.
    """

    def __init__(self, folder: Path | str, *, dtype: torch.dtype | None = None) -> None:
        self.folder = Path(folder)
        self.config = _read_config(self.folder)
        named = list(getattr(self.config, "architectures", None) or [])
        if CONVERTED & set(named):
            raise ModelError(
                f"model {self.folder}: {named[0]} is converted from its weights; plan it as OPTForCausalLM"
            )
        stored = dtype or _dtype_of(self.config)
        self._checked = set()
        self._entries = {
            name: _Entry(
                shard="", dtype=_NAMES[stored], shape=shape, begin=0, nbytes=math.prod(shape) * stored.itemsize
            )
            for name, shape in _shapes(self.config).items()
        }

    def read(self, name: str) -> Tensor:
        """The tensor without values, on the meta device."""
        return torch.empty(self.shape(name), dtype=self.dtype(name), device="meta")


def resolve_description(model: str) -> Path:
    """Folder with the config.json of ``model``: a folder, a config.json, or a hub id, of which that file is fetched.

    Raises:
        ModelError: there is none, or it cannot be reached.
    """
    path = Path(model).expanduser()
    if path.name == "config.json" and path.is_file():
        return path.parent
    if path.is_dir():
        return path
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise ModelError(f"model {model!r}: no such folder; give a folder with a config.json, or a hub id")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(model, "config.json")).parent
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"model {model!r}: neither a local folder nor a hub model whose config.json can be reached "
            f"({one_line(error)}); check the name, or give a local folder"
        ) from error


def _dtype_of(config: Any) -> torch.dtype:
    found = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None) or torch.float32
    if isinstance(found, str):
        found = getattr(torch, found.removeprefix("torch."), None)
    if found not in _NAMES or not found.is_floating_point:
        raise ModelError(f"config.json: its dtype {found} is no floating-point type of safetensors weights")
    return found


def _shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor on disk; experts as their families store them."""
    architecture, family = family_of(config)
    if family.pooling is not None:
        raise ModelError(f"config.json: {architecture} classifies images; only language models are planned for")
    model = build_skeleton(config, dtype=torch.bfloat16, device=torch.device("cpu"))
    shapes: dict[str, tuple[int, ...]] = {}
    if family.experts is not None:
        for index, block in enumerate(model.get_submodule(family.blocks)):
            stem = f"{family.blocks}.{index}.{family.experts.path}"
            experts = replace_experts(block, family.experts.path, name=stem)
            if experts is None:
                continue
            parts = expert_tensors(stem, experts.num_experts, gate_up=family.experts.gate_up, down=family.experts.down)
            whole = {f"{stem}.{name}": tuple(tensor.shape) for name, tensor in experts.state_dict().items()}
            for weight, stored in parts.items():
                rows, *rest = whole[weight]
                shapes |= {name: (rows // len(stored), *rest) for name in stored}
    made = {name for name in shapes if family.experts is not None}
    tied = bool(config.tie_word_embeddings)
    for name, tensor in model.state_dict().items():
        of_expert = family.experts is not None and f".{family.experts.path}." in name
        if not of_expert and name not in made and not (tied and name == f"{family.head}.weight"):
            shapes[name] = tuple(tensor.shape)
    return shapes
