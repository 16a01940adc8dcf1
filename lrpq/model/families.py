"""Where blocks, embeddings, norms, head and linear layers are, per architecture: a table, not branches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedConfig

from lrpq.errors import ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """A part of a block whose output is that of its last linear layer: attention or MLP."""

    path: str
    """Module inside the block."""
    last: str
    """Its last linear layer; the unit's output is this layer's, unchanged."""
    returns_tuple: bool
    """Whether the module returns (output, something else) instead of the output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Module paths of one architecture."""

    blocks: str
    """The list of decoder blocks."""
    outside: tuple[str, ...]
    """Modules with weights that are used before the first block."""
    norm: str
    """Final norm."""
    head: str
    """Language-model head."""
    sites: Mapping[str, tuple[str, ...]]
    """Input site -> linear layers that read it, in the order in which a block's forward reaches them.

    The members of a site are also what serving kernels fuse (q, k and v; gate and up)."""
    units: tuple[Unit, ...]
    """What need not be run again once the input of its last layer is known."""


LLAMA = Family(
    blocks="model.layers",
    outside=("model.embed_tokens",),
    norm="model.norm",
    head="lm_head",
    sites={
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "o": ("self_attn.o_proj",),
        "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
        "down": ("mlp.down_proj",),
    },
    units=(
        Unit(path="self_attn", last="self_attn.o_proj", returns_tuple=True),
        Unit(path="mlp", last="mlp.down_proj", returns_tuple=False),
    ),
)

FAMILIES: Mapping[str, Family] = {"LlamaForCausalLM": LLAMA}


def family_of(config: PreTrainedConfig) -> tuple[str, Family]:
    """Return the architecture's name and its table entry.

    Raises:
        ModelError: the architecture has no entry; the known ones are named.
    """
    architectures = list(getattr(config, "architectures", None) or [])
    for name in architectures:
        if name in FAMILIES:
            return name, FAMILIES[name]
    found = ", ".join(architectures) or f"model_type {config.model_type!r} without architectures"
    raise ModelError(f"unsupported architecture: {found}; supported: {', '.join(sorted(FAMILIES))}")
