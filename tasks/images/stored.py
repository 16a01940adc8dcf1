"""Preprocessed images in the store, with their labels."""

from __future__ import annotations

import torch
from torch import Tensor

from tasks.store.objects import ObjectStore
from tasks.store.tensors import read_tensors, write_tensors

PIXELS, LABELS = "pixels", "labels"


def write_images(store: ObjectStore, key: str, pixels: Tensor, labels: Tensor) -> None:
    """Store pixels [n, channels, height, width] (float32) and labels [n], -1 where there are none."""
    write_tensors(store, key, {PIXELS: pixels.float(), LABELS: labels.to(torch.int64)}, {})


def read_images(store: ObjectStore, key: str) -> Tensor:
    """Pixels, float32 [n, channels, height, width]."""
    return read_tensors(store, key, [PIXELS])[PIXELS]


def read_labels(store: ObjectStore, key: str) -> Tensor:
    """Labels, int64 [n]."""
    return read_tensors(store, key, [LABELS])[LABELS]
