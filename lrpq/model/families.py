"""Where blocks, embeddings, norms, head and linear layers are, per architecture: a table, not branches.

Language models and image classifiers: what is a token here is a patch there (docs/adr/0019).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedConfig

from lrpq.errors import ModelError
from lrpq.model.pooling import FirstToken, FirstTokenAndMean, MeanToken

STAGE = "*"
"""Stands for the index of a stage in the path of blocks that lie in stages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """A part of a block whose output is that of its last linear layer: attention or MLP."""

    path: str
    """Module inside the block."""
    last: str
    """Its last linear layer; the unit's output is this layer's, unchanged."""
    returns_tuple: bool
    """Whether the module returns (output, something else) instead of the output."""
    added: bool
    """Whether the block adds the output to its hidden states as it is, with no norm in between."""
    norm: str | None = None
    """Of a block that puts its tokens into another order (windows): the norm whose output the module reads. What the
    module would read without this norm are the hidden states that its output is added to, in its order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Merging:
    """What makes fewer and wider tokens behind a stage: one more block, with layers of its own and without units."""

    path: str
    """Module inside the stage, where a stage has one."""
    sites: Mapping[str, tuple[str, ...]]
    """Input site -> linear layers that read it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """The experts of a block; in transformers two 3-D parameters, one tensor an expert and projection on disk."""

    path: str
    """The experts' module inside the block, where a block has one; other blocks of the model may be dense."""
    gate_up: tuple[str, str]
    """Names on disk, inside an expert, of the gate and the up projection."""
    down: str
    """Name on disk of the down projection."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Module paths of one architecture."""

    blocks: str
    """The list of blocks; of blocks in stages, with `STAGE` in place of the index."""
    outside: tuple[str, ...]
    """Modules with weights that are used before the first block, the embedding first."""
    tail: tuple[str, ...]
    """Modules between the last block and the head, in order."""
    head: str
    """Language-model head, or the classifier."""
    logit_cap: str | None = None
    """Field of the text configuration with the cap c of the logits, c tanh(z / c); null there is no cap."""
    sites: Mapping[str, tuple[str, ...]]
    """Input site -> linear layers that read it, in the order in which a block's forward reaches them.

    The members of a site are also what serving kernels fuse (q, k and v; gate and up)."""
    experts: Experts | None = None
    """In blocks with experts, the sites of the dense MLP do not exist."""
    units: tuple[Unit, ...]
    """What need not be run again once the input of its last layer is known."""
    optional: frozenset[str] = frozenset()
    """Of ``outside`` and ``tail``: modules that some configurations do not have."""
    merging: Merging | None = None
    """Behind the blocks of a stage, where stages have different numbers of tokens."""
    pooling: type[nn.Module] | None = None
    """Of an image classifier: what its head reads of the tail's output, [n, t, h] -> [n, 1, h]. None: a language model,
    whose head reads every token."""


_ATTENTION = Unit(path="self_attn", last="self_attn.o_proj", returns_tuple=True, added=True)
_MLP = Unit(path="mlp", last="mlp.down_proj", returns_tuple=False, added=True)

LLAMA = Family(
    blocks="model.layers",
    outside=("model.embed_tokens",),
    tail=("model.norm",),
    head="lm_head",
    sites={
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "o": ("self_attn.o_proj",),
        "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
        "down": ("mlp.down_proj",),
    },
    units=(_ATTENTION, _MLP),
)
_NORMED_UNITS = (replace(_ATTENTION, added=False), replace(_MLP, added=False))
GEMMA = replace(LLAMA, logit_cap="final_logit_softcapping", units=_NORMED_UNITS)
GEMMA_MULTIMODAL = replace(  # transformers caps the logits of the text model alone
    LLAMA,
    units=_NORMED_UNITS,
    blocks="model.language_model.layers",
    outside=("model.language_model.embed_tokens",),
    tail=("model.language_model.norm",),
)
PHI3 = replace(
    LLAMA,
    sites={
        "qkv": ("self_attn.qkv_proj",),
        "o": ("self_attn.o_proj",),
        "gate_up": ("mlp.gate_up_proj",),
        "down": ("mlp.down_proj",),
    },
)
OPT = Family(
    blocks="model.decoder.layers",
    outside=("model.decoder.embed_tokens", "model.decoder.embed_positions", "model.decoder.project_in"),
    tail=("model.decoder.final_layer_norm", "model.decoder.project_out"),
    optional=frozenset({"model.decoder.project_in", "model.decoder.final_layer_norm", "model.decoder.project_out"}),
    head="lm_head",
    sites={
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "o": ("self_attn.out_proj",),
        "up": ("fc1",),
        "down": ("fc2",),
    },
    units=(Unit(path="self_attn", last="self_attn.out_proj", returns_tuple=True, added=True),),
)
GPT_NEOX = Family(
    blocks="gpt_neox.layers",
    outside=("gpt_neox.embed_in",),
    tail=("gpt_neox.final_layer_norm",),
    head="lm_head",
    sites={
        "qkv": ("attention.query_key_value",),
        "o": ("attention.dense",),
        "up": ("mlp.dense_h_to_4h",),
        "down": ("mlp.dense_4h_to_h",),
    },
    units=(
        Unit(path="attention", last="attention.dense", returns_tuple=True, added=True),
        Unit(path="mlp", last="mlp.dense_4h_to_h", returns_tuple=False, added=True),
    ),
)
MIXTRAL = replace(
    LLAMA,
    experts=Experts(path="mlp.experts", gate_up=("w1", "w3"), down="w2"),
    units=(_ATTENTION,),
)
QWEN3_MOE = replace(
    LLAMA,
    experts=Experts(path="mlp.experts", gate_up=("gate_proj", "up_proj"), down="down_proj"),
    units=(_ATTENTION,),
)

FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "Qwen2ForCausalLM": LLAMA,
    "Qwen3ForCausalLM": LLAMA,
    "Gemma2ForCausalLM": GEMMA,
    "Gemma3ForCausalLM": GEMMA,
    "Gemma3ForConditionalGeneration": GEMMA_MULTIMODAL,
    "Phi3ForCausalLM": PHI3,
    "OPTForCausalLM": OPT,
    "GPTNeoXForCausalLM": GPT_NEOX,
    "MixtralForCausalLM": MIXTRAL,
    "Qwen3MoeForCausalLM": QWEN3_MOE,
}


def _image_transformer(base: str) -> Family:
    return Family(
        blocks=f"{base}.layers",
        outside=(f"{base}.embeddings",),
        tail=(f"{base}.layernorm",),
        head="classifier",
        sites={
            "qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
            "o": ("attention.o_proj",),
            "up": ("mlp.fc1",),
            "down": ("mlp.fc2",),
        },
        units=(
            Unit(path="attention", last="attention.o_proj", returns_tuple=True, added=True),
            Unit(path="mlp", last="mlp.fc2", returns_tuple=False, added=True),
        ),
        pooling=FirstToken,
    )


SWIN = Family(
    blocks=f"swin.encoder.layers.{STAGE}.blocks",
    merging=Merging(path="downsample", sites={"merge": ("reduction",)}),
    outside=("swin.embeddings",),
    tail=("swin.layernorm",),
    head="classifier",
    sites={
        "qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        "o": ("attention.o_proj",),
        "up": ("mlp.fc1",),
        "down": ("mlp.fc2",),
    },
    units=(
        Unit(path="attention", last="attention.o_proj", returns_tuple=True, added=True, norm="layernorm_before"),
        Unit(path="mlp", last="mlp.fc2", returns_tuple=False, added=True, norm="layernorm_after"),
    ),
    pooling=MeanToken,
)
_PLAIN = _image_transformer("dinov2")
DINOV2 = replace(  # outputs of its units are scaled before they are added
    _PLAIN,
    blocks="dinov2.encoder.layer",
    units=tuple(replace(unit, added=False) for unit in _PLAIN.units),
    pooling=FirstTokenAndMean,
)
CLASSIFIERS: Mapping[str, Family] = {
    "ViTForImageClassification": _image_transformer("vit"),
    "DeiTForImageClassification": _image_transformer("deit"),
    "SwinForImageClassification": SWIN,
    "Dinov2ForImageClassification": DINOV2,
}
"""Architectures that classify images."""
CONVERTED = frozenset({"GPT2LMHeadModel"})
"""Architectures that are read as another: lrpq.model.source."""


def family_of(config: PreTrainedConfig) -> tuple[str, Family]:
    """Return the architecture's name and its table entry.

    Raises:
        ModelError: the architecture has no entry; the known ones are named.
    """
    architectures = list(getattr(config, "architectures", None) or [])
    for name in architectures:
        family = FAMILIES.get(name) or CLASSIFIERS.get(name)
        if family is not None:
            return name, family
    found = ", ".join(architectures) or f"model_type {config.model_type!r} without architectures"
    known = ", ".join(sorted([*FAMILIES, *CONVERTED]))
    raise ModelError(f"unsupported architecture: {found}; supported: {known}")


def classifies_images(config: PreTrainedConfig) -> bool:
    """Whether the configuration is one of an image classifier, by its architectures."""
    return any(name in CLASSIFIERS for name in getattr(config, "architectures", None) or [])
