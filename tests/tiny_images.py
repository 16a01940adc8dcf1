"""Tiny random image classifiers, written as real checkpoints, and images for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
_SWIN: Mapping[str, Any] = {
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "mlp_ratio": 2.0,
    "image_size": SIZE,
    "patch_size": 2,
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
    "swin": ("SwinForImageClassification", "SwinConfig", _SWIN),
    "swin-padded": (  # 10 x 9 patches in windows of 4, merged to 5 x 5
        "SwinForImageClassification",
        "SwinConfig",
        {**_SWIN, "image_size": [20, 18], "use_absolute_embeddings": True},
    ),
    "dinov2": (
        "Dinov2ForImageClassification",
        "Dinov2Config",
        {**{k: v for k, v in _SIZES.items() if k != "intermediate_size"}, "mlp_ratio": 2, "layerscale_value": 0.7},
    ),
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


def gratings(num: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Images of waves in one of `CLASSES` directions, of any phase and contrast, in noise; and the directions."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (num,), generator=generator)
    angle = (labels * torch.pi / CLASSES)[:, None, None]
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    phase, contrast = (
        2 * torch.pi * torch.rand(num, 1, 1, generator=generator),
        torch.rand(num, 1, 1, generator=generator),
    )
    wave = torch.sin(0.8 * (angle.cos() * x + angle.sin() * y) + phase) * (0.5 + contrast)
    noise = 0.4 * torch.randn(num, CHANNELS, SIZE, SIZE, generator=generator)
    return wave[:, None] + noise, labels


def train_classifier(folder: Path, name: str, *, steps: int = 250) -> Path:
    """Train a case on `gratings` for a few seconds, and write it with outlier channels behind its norms.

    These, the trouble of vision transformers, do not come up in so short a time: some gains are made larger, and the
    next layers' columns smaller, which leaves the function what it was.
    """
    architecture, config, options = IMAGE_CASES[name]
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(getattr(transformers, config)(**options))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for step in range(steps):
        x, labels = gratings(64, seed=1000 + step)
        torch.nn.functional.cross_entropy(model(pixel_values=x).logits, labels).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for norm, layers in _norms(model):
            norm.weight[::8] *= 12
            norm.bias[::8] *= 12
            for layer in layers:
                layer.weight[:, ::8] /= 12
    model.eval().save_pretrained(folder)
    return folder


def _norms(model: Any) -> Iterator[tuple[Any, list[Any]]]:
    """Norms of the blocks, and the linear layers that read them."""
    for module in model.modules():
        if hasattr(module, "layernorm_before"):
            attention = module.attention
            yield module.layernorm_before, [attention.q_proj, attention.k_proj, attention.v_proj]
            yield module.layernorm_after, [module.mlp.fc1]
        elif hasattr(module, "reduction"):
            yield module.norm, [module.reduction]
