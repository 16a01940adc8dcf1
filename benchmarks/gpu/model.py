"""A random Llama whose blocks all have the same weights, in host memory: no checkpoint of 140 GB is needed."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu import matrices
from benchmarks.gpu.shapes import VOCABULARY, BlockShape
from lrpq.errors import ModelError
from lrpq.model.safetensors_source import ModelSource

_PREFIX = "model.layers."


class RandomSource(ModelSource):
    """Tensors of one block, embedding and head, made on ``device`` and kept on the host in bfloat16.

    Args:
        shape: of the blocks.
        layers: how many blocks the model has.
        length: of its windows.
        device: where random numbers are drawn.
        seed: of the weights.
    """

    as_on_disk = False

    def __init__(self, shape: BlockShape, *, layers: int, length: int, device: torch.device, seed: int = 0) -> None:
        # not the parent's: there is no folder to open
        self.folder = Path("(random)")
        self.config = shape.config(layers=layers, length=length)
        self._layers = layers
        self._tensors: dict[str, Tensor] = {}
        g = matrices.generator(seed, device)
        projections = {name: "self_attn" if name in "qkvo" else "mlp" for name in shape.layers}
        for i, (name, (d_out, d_in)) in enumerate(shape.layers.items()):
            W = matrices.weights(d_out, d_in, seed=seed + i, device=device)
            self._tensors[f"{projections[name]}.{name}_proj.weight"] = W.bfloat16().cpu()
        for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            gain = 0.5 + torch.rand(shape.hidden, generator=g, device=device)
            self._tensors[name] = gain.bfloat16().cpu()
        scales = matrices.channel_scales(shape.hidden, seed=seed, device=device)
        table = torch.randn(VOCABULARY, shape.hidden, generator=g, device=device) * scales
        head = torch.randn(VOCABULARY, shape.hidden, generator=g, device=device) * shape.hidden**-0.5
        self._outside = {
            "model.embed_tokens.weight": table.bfloat16().cpu(),
            "model.norm.weight": torch.ones(shape.hidden, dtype=torch.bfloat16),
            "lm_head.weight": head.bfloat16().cpu(),
        }

    def names(self) -> list[str]:
        """All tensors of all blocks."""
        blocks = [f"{_PREFIX}{i}.{name}" for i in range(self._layers) for name in self._tensors]
        return sorted([*blocks, *self._outside])

    def __contains__(self, name: str) -> bool:
        return name in self.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.read(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.read(name).dtype

    def nbytes(self, name: str) -> int:
        return self.read(name).nbytes

    def read(self, name: str) -> Tensor:
        """The tensor itself: nobody may change it."""
        if name.startswith(_PREFIX):
            local: str = name.removeprefix(_PREFIX).split(".", 1)[1]
            return self._tensors[local]
        if name not in self._outside:
            raise ModelError(f"random model: no tensor {name}")
        found: Tensor = self._outside[name]
        return found


def random_tokens(windows: int, length: int, *, seed: int = 0) -> Tensor:
    """Token numbers [windows, length], on the host."""
    return torch.randint(VOCABULARY, (windows, length), generator=torch.Generator().manual_seed(seed))
