"""Images of tests as PNG files in a folder a class, and a model's processor that reads them back."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from tiny_images import SIZE, gratings
from torch import Tensor
from transformers import ViTImageProcessorPil

SPREAD = 6.0
"""Of what is stored: values from -3 to 3 are bytes from 0 to 255."""


def write_processor(model: Path, *, resize: bool = False, size: int = SIZE) -> Path:
    """Write the processor that makes of a stored image about what it was."""
    ViTImageProcessorPil(
        size={"height": size, "width": size}, do_resize=resize, image_mean=[0.5] * 3, image_std=[1 / SPREAD] * 3
    ).save_pretrained(model)
    return model


def as_image(pixels: Tensor) -> Image.Image:
    """Of values [channels, height, width]."""
    values = ((pixels / SPREAD + 0.5).clamp(0, 1) * 255).round().byte()
    return Image.fromarray(values.permute(1, 2, 0).numpy())


def write_images(folder: Path, num: int, *, seed: int = 5, labelled: bool = True) -> Path:
    """Write gratings (`tiny_images`): in a folder a class, or side by side."""
    for number, (pixels, label) in enumerate(zip(*gratings(num, seed=seed), strict=True)):
        inside = folder / f"LABEL_{int(label)}" if labelled else folder
        inside.mkdir(parents=True, exist_ok=True)
        as_image(pixels).save(inside / f"{number:04d}.png")
    return folder
