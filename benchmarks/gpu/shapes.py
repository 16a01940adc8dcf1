"""The models whose blocks are measured, and tiny ones of the same proportions for machines without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import LlamaConfig

VOCABULARY = 512
"""Of the random models: embedding and head are no part of what is measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockShape:
    """A Llama's decoder block."""

    name: str
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    blocks: int
    """Of the whole model."""

    @property
    def kv(self) -> int:
        """Outputs of k and of v."""
        return self.hidden // self.heads * self.kv_heads

    @property
    def layers(self) -> Mapping[str, tuple[int, int]]:
        """Linear layer -> (d_out, d_in), in the order of execution."""
        h, f, kv = self.hidden, self.ffn, self.kv
        return {"q": (h, h), "k": (kv, h), "v": (kv, h), "o": (h, h), "gate": (f, h), "up": (f, h), "down": (h, f)}

    @property
    def sites(self) -> Mapping[str, tuple[str, ...]]:
        """Input site -> layers that read it."""
        return {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}

    def config(self, *, layers: int, length: int) -> LlamaConfig:
        """A model of some of these blocks, with a tiny vocabulary."""
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_hidden_layers=layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=VOCABULARY,
            max_position_embeddings=length,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
            architectures=["LlamaForCausalLM"],
        )


LLAMA: Mapping[str, BlockShape] = {
    "8B": BlockShape(name="8B", hidden=4096, ffn=14336, heads=32, kv_heads=8, blocks=32),
    "70B": BlockShape(name="70B", hidden=8192, ffn=28672, heads=64, kv_heads=8, blocks=80),
    "405B": BlockShape(name="405B", hidden=16384, ffn=53248, heads=128, kv_heads=8, blocks=126),
}
"""Llama 3 (arXiv:2407.21783), table 3."""
TINY: Mapping[str, BlockShape] = {
    "8B": BlockShape(name="8B", hidden=32, ffn=96, heads=4, kv_heads=2, blocks=32),
    "70B": BlockShape(name="70B", hidden=64, ffn=192, heads=8, kv_heads=2, blocks=80),
    "405B": BlockShape(name="405B", hidden=128, ffn=384, heads=8, kv_heads=2, blocks=126),
}


def of_width(hidden: int, *, head_width: int) -> BlockShape:
    """A block of any width in the proportions of the 70B model, with a key and value head for every eight heads."""
    heads = hidden // head_width
    return BlockShape(
        name=str(hidden), hidden=hidden, ffn=hidden * 7 // 2, heads=heads, kv_heads=max(1, heads // 8), blocks=1
    )
