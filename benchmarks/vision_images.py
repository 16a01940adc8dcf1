"""CIFAR-10 as two npz files of JPEGs, decoded into memory, and augmentation of whole batches where they lie.

``train.npz`` and ``test.npz`` hold ``jpeg`` (all files, one after the other), ``offsets`` (where each begins, and the
end), ``labels`` and ``classes``. The augmentation is in the spirit of RandAugment (Cubuk et al. 2020): an affine map
and one change of colour an image, of random strength; then mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019).
"""

from __future__ import annotations

import io
import itertools
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)
"""Of the 50,000 training images' channels, in [0, 1]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """A labelled set."""

    pixels: Tensor
    """uint8 [n, 3, height, width]."""
    labels: Tensor
    """int64 [n]."""
    classes: tuple[str, ...]

    def to(self, device: torch.device) -> Images:
        return Images(pixels=self.pixels.to(device), labels=self.labels.to(device), classes=self.classes)


def load_images(path: Path, *, first: int | None = None) -> Images:
    """Decode the first images of a file, or all."""
    with np.load(path, allow_pickle=False) as stored:
        jpeg, offsets = stored["jpeg"].tobytes(), stored["offsets"].tolist()
        labels, classes = stored["labels"], tuple(str(name) for name in stored["classes"])
    count = len(labels) if first is None else min(first, len(labels))
    decoded = np.stack(
        [
            np.asarray(Image.open(io.BytesIO(jpeg[start:end])).convert("RGB"))
            for start, end in itertools.pairwise(offsets[: count + 1])
        ]
    )
    pixels = torch.from_numpy(decoded).permute(0, 3, 1, 2).contiguous()
    return Images(pixels=pixels, labels=torch.from_numpy(labels[:count].astype(np.int64)), classes=classes)


@cache
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (MEAN, STD))
    return mean, std


def normalize(pixels: Tensor) -> Tensor:
    """uint8, or float in [0, 1] -> zero mean and unit variance."""
    x = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
    mean, std = _statistics(x.device)
    return (x - mean) / std


def augment(pixels: Tensor) -> Tensor:
    """uint8 [n, 3, h, w] -> normalised float32, each image changed in its own way.

    Drawn from the device's own generator, and without a word to the host: a CUDA graph can hold it.
    """
    return _erase(normalize(_recolour(_move(pixels.float() / 255)))).contiguous()


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixing:
    """How each of some batches is mixed with itself in another order."""

    share: Tensor
    """float32 [batches]: of an image's own pixels, outside the box."""
    outside: Tensor
    """float32 [batches, height, width]: 0 in the box that comes from the other image, 1 elsewhere."""

    def to(self, device: torch.device) -> Mixing:
        return Mixing(share=self.share.to(device), outside=self.outside.to(device))


def mixings(batches: int, size: int, host: np.random.Generator, *, chance: float) -> Mixing:
    """Mixup or CutMix, each for half of the share ``chance`` of batches; the rest are left alone."""
    share, outside = np.ones(batches, dtype=np.float32), np.ones((batches, size, size), dtype=np.float32)
    for i in np.flatnonzero(host.random(batches) < chance):
        if host.random() < 0.5:
            share[i] = host.beta(0.8, 0.8)
            continue
        side = math.sqrt(1 - host.beta(1.0, 1.0)) * size
        middle = host.random(2) * size
        low, high = (np.clip(middle + s * side / 2, 0, size).astype(int) for s in (-1, 1))
        outside[i, low[0] : high[0], low[1] : high[1]] = 0
    return Mixing(share=torch.from_numpy(share), outside=torch.from_numpy(outside))


def mix(x: Tensor, targets: Tensor, share: Tensor, outside: Tensor) -> tuple[Tensor, Tensor]:
    """One batch, drawn at random, mixed with itself from behind; ``targets`` [n, classes] are mixed alike."""
    own = share * outside
    whole = own.mean()
    return x * own + x.flip(0) * (1 - own), targets * whole + targets.flip(0) * (1 - whole)


def _move(x: Tensor) -> Tensor:
    """Flip half; shift all by up to four pixels; turn, shear and scale half of them."""
    n, size, device = len(x), x.shape[-1], x.device

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, device=device)

    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    shift = torch.randint(-4, 5, (n, 2), device=device) * (2 / size)
    bent = uniform(0, 1) < 0.5
    angle, shear, scale = uniform(-0.35, 0.35), uniform(-0.3, 0.3), uniform(0.8, 1.2)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    zero, one = torch.zeros_like(cos), torch.ones_like(cos)
    theta = torch.stack(
        [
            torch.where(bent, cos, one) * flip,
            torch.where(bent, cos * shear - sin, zero),
            shift[:, 0],
            torch.where(bent, sin, zero) * flip,
            torch.where(bent, sin * shear + cos, one),
            shift[:, 1],
        ],
        dim=1,
    ).view(n, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False).clamp(0, 1)


def _recolour(x: Tensor) -> Tensor:
    """One of six an image: nothing, brightness, contrast, saturation, solarize, posterize."""
    n, device = len(x), x.device
    strength = torch.rand(n, 1, 1, 1, device=device)
    factor = 0.3 + 1.4 * strength
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    grey = x.mean(dim=1, keepdim=True)
    levels = 3 + (strength * 12).floor()
    variants = torch.stack(
        [
            x,
            x * factor,
            mean + (x - mean) * factor,
            grey + (x - grey) * factor,
            torch.where(x < 0.4 + 0.6 * strength, x, 1 - x),
            (x * levels).round() / levels,
        ]
    )
    which = torch.randint(0, len(variants), (n,), device=device)
    return variants[which, torch.arange(n, device=device)].clamp(0, 1)


def _erase(x: Tensor) -> Tensor:
    """Grey out a box in a quarter of the images (Zhong et al. 2020)."""
    n, _, height, width = x.shape
    drawn = torch.rand(n, 5, 1, 1, device=x.device)
    half = (0.1 + 0.15 * drawn[:, :2]) * height
    rows = torch.arange(height, device=x.device).view(1, height, 1)
    columns = torch.arange(width, device=x.device).view(1, 1, width)
    inside = ((rows - drawn[:, 2] * height).abs() < half[:, 0]) & ((columns - drawn[:, 3] * width).abs() < half[:, 1])
    return x.masked_fill((inside & (drawn[:, 4] < 0.25))[:, None], 0.0)
