"""Models that tests share: tiny random ones of the real classes, written as real checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import settings
from transformers import LlamaConfig, LlamaForCausalLM

settings.register_profile("lrpq", deadline=None)  # times are no matter of tests: machines are shared
settings.load_profile("lrpq")


def write_llama(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    layers: int = 3,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    ffn: int = 128,
    vocabulary: int = 128,
    tied: bool = False,
    max_shard_size: str = "5GB",
    seed: int = 0,
) -> Path:
    """Write a random Llama with outlier channels; weights are large enough for logits that differ."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.25 if "proj" in name else 1.0)
                parameter[:, :: max(parameter.shape[1] // 4, 1)] *= 3
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


@pytest.fixture
def llama_folder(tmp_path: Path) -> Path:
    """A tiny float32 Llama checkpoint."""
    return write_llama(tmp_path / "llama")
