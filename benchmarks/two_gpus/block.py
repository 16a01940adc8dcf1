"""Blocks of a model's shape with random weights, as a folder that every worker opens."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.gpu.model import RandomSource
from benchmarks.gpu.shapes import BlockShape, of_width

HIDDEN = 8192
"""Of Llama 3 70B."""
SMOLLM2 = BlockShape(name="SmolLM2-135M", hidden=576, ffn=1536, heads=9, kv_heads=3, blocks=30)
"""config.json of HuggingFaceTB/SmolLM2-135M; here without its vocabulary of 49,152."""


def shape_named(name: str, *, hidden: int) -> BlockShape:
    """``70B``, of any width in its proportions, or ``smollm2``."""
    return SMOLLM2 if name == "smollm2" else of_width(hidden, head_width=max(hidden // 64, 8))


def write_blocks(folder: Path, shape: BlockShape, *, blocks: int, length: int, device: torch.device) -> Path:
    """Write a Llama of some such blocks and a vocabulary of 512."""
    source = RandomSource(shape, layers=blocks, length=length, device=device)
    folder.mkdir(parents=True)
    # a file may not hold the same memory twice, and all blocks have the same weights
    tensors = {name: source.read(name).clone() for name in source.names()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    source.config.save_pretrained(folder)
    return folder
