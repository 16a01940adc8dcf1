"""Tiny random models of every supported architecture, written as real checkpoints, and a tokenizer for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from tasks.calibration.pydoc import pydoc_documents

VOCABULARY = 320
SPECIAL = ("<unk>", "<s>", "</s>")
_SIZES: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_positions": 256,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SLIDING = ["sliding_attention", "full_attention"]


@dataclass(frozen=True)
class Case:
    """One configuration of an architecture."""

    architecture: str
    config: str
    """Name of the configuration's class."""
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    max_shard_size: str = "5GB"

    def configuration(self, **changes: Any) -> PreTrainedConfig:
        return getattr(transformers, self.config)(**{**self.options, **changes})


def _decoder(architecture: str, config: str, **options: Any) -> Case:
    return Case(architecture, config, {**_SIZES, **options})


CASES: Mapping[str, Case] = {
    "llama": _decoder("LlamaForCausalLM", "LlamaConfig"),
    "llama-rope-scaled": _decoder(
        "LlamaForCausalLM",
        "LlamaConfig",
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "mistral": _decoder("MistralForCausalLM", "MistralConfig", sliding_window=8),
    "qwen2": _decoder(
        "Qwen2ForCausalLM",
        "Qwen2Config",
        use_sliding_window=True,
        sliding_window=8,
        layer_types=_SLIDING,
        tie_word_embeddings=True,
    ),
    "qwen3": _decoder("Qwen3ForCausalLM", "Qwen3Config", head_dim=24),
    "gemma2": _decoder("Gemma2ForCausalLM", "Gemma2Config", head_dim=16, sliding_window=8, layer_types=_SLIDING),
    "gemma3": _decoder("Gemma3ForCausalLM", "Gemma3TextConfig", head_dim=16, sliding_window=8, layer_types=_SLIDING),
    "gemma3-multimodal": Case(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "text_config": {
                **_SIZES,
                "head_dim": 16,
                "sliding_window": 8,
                "layer_types": _SLIDING,
                "final_logit_softcapping": 1.0,  # transformers ignores it here
            },
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
            "image_token_index": 317,
            "boi_token_index": 318,
            "eoi_token_index": 319,
        },
    ),
    "phi3": _decoder("Phi3ForCausalLM", "Phi3Config", sliding_window=8),
    "opt": Case(
        "OPTForCausalLM",
        "OPTConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "ffn_dim": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "word_embed_proj_dim": 64,
        },
    ),
    "opt-post-norm": Case(
        "OPTForCausalLM",
        "OPTConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "ffn_dim": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "word_embed_proj_dim": 32,
            "do_layer_norm_before": False,
        },
    ),
    "gpt2": Case("GPT2LMHeadModel", "GPT2Config", _GPT),
    "gpt-neox": Case(
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "use_parallel_residual": True,
        },
    ),
    "mixtral": _decoder(
        "MixtralForCausalLM", "MixtralConfig", num_local_experts=4, num_experts_per_tok=2, sliding_window=8
    ),
    "qwen3-moe": _decoder(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        head_dim=16,
        norm_topk_prob=True,
        mlp_only_layers=[0],
    ),
    "llama-fp16": Case("LlamaForCausalLM", "LlamaConfig", _SIZES, torch.float16),
    "qwen3-bf16-sharded": Case("Qwen3ForCausalLM", "Qwen3Config", {**_SIZES, "head_dim": 16}, torch.bfloat16, "40KB"),
}
"""Name -> configuration. The last two are sources of other types; the shards of the last split its blocks."""


def build_model(case: Case, *, seed: int = 0, **changes: Any) -> Any:
    """The random model, in evaluation mode; weights are large enough for logits that differ, with outlier channels."""
    torch.manual_seed(seed)
    model = getattr(transformers, case.architecture)(case.configuration(**changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vision" in name or "multi_modal" in name:
                continue
            if parameter.ndim >= 2:
                embeds = any(part in name for part in ("embed", "wte", "wpe", "lm_head"))
                parameter.normal_(0.0, 0.1 if embeds else 0.2)
                parameter[..., :: max(parameter.shape[-1] // 4, 1)] *= 3
            elif "norm" in name or "ln_" in name:
                centre = 0.0 if "Gemma" in case.architecture else 1.0
                parameter.uniform_(centre - 0.3, centre + 0.3)
            else:
                parameter.normal_(0.0, 0.1)
    return model.to(case.dtype).eval()


def write_tiny(folder: Path, name: str, *, seed: int = 0, **changes: Any) -> Path:
    """Write the checkpoint of a case as transformers saves it."""
    case = CASES[name]
    build_model(case, seed=seed, **changes).save_pretrained(folder, max_shard_size=case.max_shard_size)
    return folder


@cache
def _tokenizer_json(adds_bos: bool) -> str:
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["\n\n".join(pydoc_documents("calibrate"))[:60_000]], trainer)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    text: str = backend.to_str()
    return text


def write_tokenizer(folder: Path, *, bos: bool = False) -> None:
    """Write a byte-level BPE of ``VOCABULARY`` entries beside a model."""
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer_json(bos)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    ).save_pretrained(folder)
