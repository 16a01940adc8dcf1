"""Tiny random image classifiers, written as real checkpoints, and images for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

SIZE, CHANNELS, CLASSES = 16, 3, 10
_SIZES: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIZE,
    "patch_size": 4,
    "num_channels": CHANNELS,
    "num_labels": CLASSES,
}
IMAGE_CASES: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "vit": ("ViTForImageClassification", "ViTConfig", _SIZES),
    "vit-wide-patches": (
        "ViTForImageClassification",
        "ViTConfig",
        {**_SIZES, "image_size": [8, 16], "patch_size": [2, 4], "qkv_bias": False, "hidden_act": "gelu_new"},
    ),
    "deit": ("DeiTForImageClassification", "DeiTConfig", _SIZES),
}
"""Name -> architecture, class of the configuration, options."""


def build_classifier(name: str, *, seed: int = 0, **changes: Any) -> Any:
    """The random model, in evaluation mode: every bias and gain counts, and logits differ."""
    architecture, config, options = IMAGE_CASES[name]
    torch.manual_seed(seed)
    model = getattr(transformers, architecture)(getattr(transformers, config)(**{**options, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()


def write_classifier(folder: Path, name: str, *, seed: int = 0, **changes: Any) -> Path:
    build_classifier(name, seed=seed, **changes).save_pretrained(folder)
    return folder


def images(num: int, name: str = "vit", *, seed: int = 7) -> Tensor:
    """Normal noise of the size that the model reads."""
    size = IMAGE_CASES[name][2]["image_size"]
    height, width = size if isinstance(size, list) else (size, size)
    return torch.randn(num, CHANNELS, height, width, generator=torch.Generator().manual_seed(seed))
