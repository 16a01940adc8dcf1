"""Blocks of a 70B model with random weights, as a folder that every worker opens."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.gpu.model import RandomSource
from benchmarks.gpu.shapes import of_width

HIDDEN = 8192
"""Of Llama 3 70B."""


def write_blocks(folder: Path, *, hidden: int, blocks: int, length: int, device: torch.device) -> Path:
    """Write a Llama of some such blocks and a vocabulary of 512; narrower ones have the same proportions."""
    shape = of_width(hidden, head_width=max(hidden // 64, 8))
    source = RandomSource(shape, layers=blocks, length=length, device=device)
    folder.mkdir(parents=True)
    # a file may not hold the same memory twice, and all blocks have the same weights
    tensors = {name: source.read(name).clone() for name in source.names()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    source.config.save_pretrained(folder)
    return folder
