"""Blocks of a 70B model with random weights, as a folder that every worker opens."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.gpu.model import RandomSource
from benchmarks.gpu.shapes import LLAMA, TINY


def write_blocks(folder: Path, *, tiny: bool, blocks: int, length: int, device: torch.device) -> Path:
    """Write a Llama of some such blocks and a vocabulary of 512; ``tiny`` ones have the same proportions."""
    shape = (TINY if tiny else LLAMA)["70B"]
    source = RandomSource(shape, layers=blocks, length=length, device=device)
    folder.mkdir(parents=True)
    # a file may not hold the same memory twice, and all blocks have the same weights
    tensors = {name: source.read(name).clone() for name in source.names()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    source.config.save_pretrained(folder)
    return folder
