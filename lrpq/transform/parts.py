"""The layers, biases, routers and heads of a model that a graph's entry speaks of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from lrpq.model.layers import LinearSpec
from lrpq.model.streaming import BlockStream


def site_layers(stream: BlockStream, block: int, site: str) -> tuple[LinearSpec, ...]:
    """Layers that read a site of a block; where it has experts, all experts' sites of that name."""
    return tuple(
        spec
        for spec in stream.block_specs(block)
        if spec.input_site == site or (spec.routed and spec.input_site.endswith(f".{site}"))
    )


def stored_biases(stream: BlockStream, module: str) -> tuple[str, ...]:
    """Tensor on disk of a linear layer's bias, of none where it has none."""
    has_one = getattr(stream.model.get_submodule(module), "bias", None) is not None
    return stream.stored(f"{module}.bias") if has_one else ()


def routers_of(stream: BlockStream, block: int, paths: Sequence[str]) -> list[str]:
    """Those of some module paths that hold a matrix of their own in a block."""
    prefix = f"{stream.family.blocks}.{block}."
    own = stream.blocks[block].state_dict()
    return [prefix + path for path in paths if f"{path}.weight" in own]


def head_size(config: PreTrainedConfig) -> int:
    """Channels of one head of attention."""
    text: Any = config.get_text_config()
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def num_value_heads(config: PreTrainedConfig) -> int:
    """Heads of the values: key-value heads, of which each serves a group of query heads."""
    text: Any = config.get_text_config()
    return int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
