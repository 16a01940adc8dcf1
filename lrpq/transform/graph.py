"""Which norm feeds which linear layers and what writes the residual stream, per architecture: a table, not branches.

Sites are those of lrpq.model.families; this table says what lies before them. It is what both transforms need: a
rotation folds a norm's gain into the sites that it feeds, a scaling takes from the feed what it gives to the site.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lrpq.errors import ModelError
from lrpq.model.families import family_of
from lrpq.model.safetensors_source import ModelSource


@dataclass(frozen=True, slots=True, kw_only=True)
class NormFeed:
    """A norm whose output some sites read, and nothing else does."""

    norm: str
    """Module path in the block."""
    site: str
    """Input site; in blocks with experts, of all experts."""
    routers: tuple[str, ...] = ()
    """Further modules, where a block has them, that read the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearFeed:
    """A linear layer whose last outputs, each times something that does not depend on it, are a site's inputs.

    The values of attention (the pattern is linear in them) and the up projection of a gated MLP. Where the layer is
    fused (Phi-3: q, k, v; gate, up), its last rows are these.
    """

    linear: str
    """Module path in the block."""
    site: str
    per_head: bool
    """Whether the outputs are those of key-value heads, each of which serves a group of query heads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """What lies before the sites of a block, and what transforms can make of it."""

    norms: tuple[NormFeed, ...]
    linears: tuple[LinearFeed, ...]
    writes: tuple[str, ...] = ("o", "down")
    """Sites whose layers' outputs are added to the residual stream."""
    stored_offset: float = 0.0
    """The gain of a norm minus what is stored of it: Gemma stores gain - 1."""
    no_rotation: str | None = None
    """Why the residual stream cannot be rotated; None where it can."""
    no_smoothing: str | None = None
    """Why channels cannot be scaled; None where they can."""
    no_exponents: str | None = None
    """Why sites and residual stream cannot be scaled by powers of two without a rounding; None where they can."""
    normed: tuple[str, ...] = ()
    """Layers whose outputs a norm reads that has the epsilon of the norms of the residual stream."""


_VALUES = LinearFeed(linear="self_attn.v_proj", site="o", per_head=True)
_UP = LinearFeed(linear="mlp.up_proj", site="down", per_head=False)

LLAMA = Graph(
    norms=(
        NormFeed(norm="input_layernorm", site="qkv"),
        NormFeed(norm="post_attention_layernorm", site="gate_up", routers=("mlp.gate",)),
    ),
    linears=(_VALUES, _UP),
)
QWEN3 = replace(LLAMA, normed=("self_attn.q_proj", "self_attn.k_proj"))
PHI3 = replace(
    LLAMA,
    linears=(replace(_VALUES, linear="self_attn.qkv_proj"), replace(_UP, linear="mlp.gate_up_proj")),
)
GEMMA = Graph(
    norms=(
        NormFeed(norm="input_layernorm", site="qkv"),
        NormFeed(norm="pre_feedforward_layernorm", site="gate_up"),
    ),
    linears=(_VALUES, _UP),
    stored_offset=1.0,
    no_rotation="the norms behind attention and MLP scale channels of what is added to the residual stream, and no "
    "linear layer follows that could absorb their gains",
    no_exponents="its norms store gain - 1, and gain / 2^k - 1 has digits that the stored type has not",
)
EXPERTS = replace(
    LLAMA,
    no_smoothing="a scale for the experts would have to be judged on the tokens that the router sends to each, which "
    "is not done",
)
QWEN3_EXPERTS = replace(EXPERTS, normed=QWEN3.normed)
LAYER_NORM = Graph(
    norms=(),
    linears=(),
    no_rotation="its LayerNorm subtracts the mean over channels, which does not commute with a rotation",
    no_smoothing="its norms have biases and its MLP no gate, and no table says which of its sites could be scaled",
    no_exponents="its norms have biases, and no table says which of its sites could be scaled",
)
IMAGE_CLASSIFIER = LAYER_NORM
"""All of them have LayerNorm."""

GRAPHS: Mapping[str, Graph] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "Qwen2ForCausalLM": LLAMA,
    "Qwen3ForCausalLM": QWEN3,
    "Phi3ForCausalLM": PHI3,
    "Gemma2ForCausalLM": GEMMA,
    "Gemma3ForCausalLM": GEMMA,
    "Gemma3ForConditionalGeneration": GEMMA,
    "MixtralForCausalLM": EXPERTS,
    "Qwen3MoeForCausalLM": QWEN3_EXPERTS,
    "OPTForCausalLM": LAYER_NORM,
    "GPTNeoXForCausalLM": LAYER_NORM,
}
"""As lrpq.model.families.FAMILIES; GPT-2 is read as OPT."""


def rotatable_graph(source: ModelSource) -> Graph:
    """The table's entry of a model whose residual stream can be rotated.

    Raises:
        ModelError: the architecture is unknown, or computes another function when rotated; it says why.
    """
    architecture, _ = family_of(source.config)
    graph = GRAPHS[architecture]
    if graph.no_rotation is not None:
        raise _refused(source, architecture, "rotated", graph.no_rotation)
    return graph


def smoothable_graph(source: ModelSource) -> Graph:
    """The table's entry of a model whose channels can be scaled.

    Raises:
        ModelError: the architecture is unknown, or its channels cannot be scaled; it says why.
    """
    architecture, _ = family_of(source.config)
    graph = GRAPHS[architecture]
    if graph.no_smoothing is not None:
        raise _refused(source, architecture, "smoothed", graph.no_smoothing)
    return graph


def exactly_scalable_graph(source: ModelSource) -> Graph:
    """The table's entry of a model that can be scaled by powers of two without a rounding.

    Raises:
        ModelError: the architecture is unknown, or cannot be scaled so; it says why.
    """
    architecture, _ = family_of(source.config)
    graph = GRAPHS.get(architecture, IMAGE_CLASSIFIER)
    if graph.no_exponents is not None:
        raise _refused(
            source,
            architecture,
            "scaled by powers of two",
            graph.no_exponents,
            instead="compress it with scales of 16 bits",
        )
    return graph


def _refused(
    source: ModelSource,
    architecture: str,
    verb: str,
    reason: str,
    *,
    instead: str = "compress it without this transform",
) -> ModelError:
    return ModelError(f"model {source.folder}: {architecture} cannot be {verb}: {reason}; {instead}")
