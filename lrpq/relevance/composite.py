"""Which rule for which module, as data, and the scope inside which a block follows it.

`COMPOSITE` is a table from module class to rule. A family is supported by naming the classes of its decoder
block: usually four lines (norm, gated MLP, attention, the block itself). A class that is not listed is
refused by name, because a module whose rule is unknown would silently propagate a plain gradient as
relevance. Lookup is by the exact class: a subclass may have another forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from typing import Any

from torch import Tensor, nn
from transformers import activations
from transformers.models.deit import modeling_deit as deit
from transformers.models.dinov2 import modeling_dinov2 as dinov2
from transformers.models.gemma import modeling_gemma as gemma
from transformers.models.gemma2 import modeling_gemma2 as gemma2
from transformers.models.gemma3 import modeling_gemma3 as gemma3
from transformers.models.gpt2 import modeling_gpt2 as gpt2
from transformers.models.gpt_neox import modeling_gpt_neox as gpt_neox
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.mixtral import modeling_mixtral as mixtral
from transformers.models.opt import modeling_opt as opt
from transformers.models.phi3 import modeling_phi3 as phi3
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3_moe
from transformers.models.swin import modeling_swin as swin
from transformers.models.vit import modeling_vit as vit
from transformers.pytorch_utils import Conv1D

from lrpq.errors import ModelError
from lrpq.model.experts import Expert, LinearExperts, RoutedLinear
from lrpq.model.pooling import FirstToken, FirstTokenAndMean, MeanToken
from lrpq.relevance import rules
from lrpq.relevance.attention import attention_patch
from lrpq.relevance.rules import Pass as Pass
from lrpq.relevance.rules import PassSwitch as PassSwitch


class Relevance(Enum):
    """What weighs the tokens of the Hessian."""

    NONE = "none"
    FISHER = "fisher"
    LRP = "lrp"
    CP_LRP = "cp-lrp"
    BLEND = "blend"
    """Geometric mean of FISHER and LRP."""

    @property
    def passes(self) -> tuple[Pass, ...]:
        """Backward passes that it needs; the Fisher's always, since the curvature c is the Fisher's."""
        return _PASSES[self]


_PASSES: Mapping[Relevance, tuple[Pass, ...]] = {
    Relevance.NONE: (Pass.FISHER,),
    Relevance.FISHER: (Pass.FISHER,),
    Relevance.LRP: (Pass.FISHER, Pass.LRP),
    Relevance.CP_LRP: (Pass.FISHER, Pass.CP_LRP),
    Relevance.BLEND: (Pass.FISHER, Pass.LRP),
}

Rule = Callable[[Any, PassSwitch], Mapping[str, object]]
"""From a module and the switch to the instance attributes that the module carries inside the scope."""


def linear(module: nn.Module, switch: PassSwitch) -> Mapping[str, object]:
    """0-LRP: the forward is linear (or only sums its children's outputs); relevance is gradient x input."""
    return {}


def activation(module: nn.Module, switch: PassSwitch) -> Mapping[str, object]:
    """Identity rule for an elementwise activation module."""
    original: Callable[[Tensor], Tensor] = module.forward

    def forward(z: Tensor) -> Tensor:
        y: Tensor = rules.identity_rule(original, z, switch)
        return y

    return {"forward": forward}


def gated_mlp(module: Any, switch: PassSwitch) -> Mapping[str, object]:
    """Half rule for down(act(gate(x)) * up(x)); the activation follows its own row of the table."""

    def forward(x: Tensor) -> Tensor:
        gate = module.act_fn(module.gate_proj(x))
        y: Tensor = module.down_proj(rules.half_product(gate, module.up_proj(x), switch))
        return y

    return {"forward": forward}


def fused_gated_mlp(module: Any, switch: PassSwitch) -> Mapping[str, object]:
    """Half rule for down(up * act(gate)); gate and up are the two halves of one layer's output (Phi-3)."""

    def forward(hidden_states: Tensor) -> Tensor:
        gate, up = module.gate_up_proj(hidden_states).chunk(2, dim=-1)
        y: Tensor = module.down_proj(rules.half_product(module.activation_fn(gate), up, switch))
        return y

    return {"forward": forward}


def routed_experts(module: LinearExperts, switch: PassSwitch) -> Mapping[str, object]:
    """Half rule for both products of routed experts: act(gate) * up, and output * router weight (AttnLRP).

    The module's loop over experts stays as it is; it forms the two products by calling ``self.gated(gate, up)``
    and ``self.weighted(y, weight)``, which are replaced here.
    """

    def gated(gate: Tensor, up: Tensor) -> Tensor:
        product: Tensor = rules.half_product(module.act_fn(gate), up, switch)
        return product

    def weighted(y: Tensor, weight: Tensor) -> Tensor:
        product: Tensor = rules.routed_product(y, weight, switch)
        return product

    return {"gated": gated, "weighted": weighted}


def router(module: nn.Module, switch: PassSwitch) -> Mapping[str, object]:
    """Linear layer, then a softmax that keeps its own derivative, as in attention; top-k only selects."""
    return {}


def rms_norm(module: Any, switch: PassSwitch) -> Mapping[str, object]:
    """Constant normaliser; Llama's RMSNorm and its copies."""

    def forward(hidden_states: Tensor) -> Tensor:
        y: Tensor = rules.rms_norm(hidden_states, module.weight, module.variance_epsilon, switch)
        return y

    return {"forward": forward}


def rms_norm_unit_offset(module: Any, switch: PassSwitch) -> Mapping[str, object]:
    """Constant normaliser; Gemma's RMSNorm, whose gain is 1 + weight."""

    def forward(x: Tensor) -> Tensor:
        y: Tensor = rules.rms_norm_unit_offset(x, module.weight, module.eps, switch)
        return y

    return {"forward": forward}


def layer_norm(module: nn.LayerNorm, switch: PassSwitch) -> Mapping[str, object]:
    """Constant standard deviation."""
    if len(module.normalized_shape) != 1:
        raise ModelError(f"LayerNorm over {module.normalized_shape}: expected one axis; no rule for more is known")

    def forward(x: Tensor) -> Tensor:
        y: Tensor = rules.layer_norm(x, module.weight, module.bias, module.eps, switch)
        return y

    return {"forward": forward}


COMPOSITE: Mapping[type[nn.Module], Rule] = {
    nn.Linear: linear,
    Conv1D: linear,
    nn.Dropout: linear,  # the sweep refuses blocks in training mode
    nn.Identity: linear,
    nn.ModuleList: linear,
    nn.Sequential: linear,
    nn.LayerNorm: layer_norm,
    nn.SiLU: activation,
    nn.ReLU: activation,
    activations.SiLUActivation: activation,
    activations.FastGELUActivation: activation,
    activations.GELUActivation: activation,
    activations.GELUTanh: activation,
    activations.NewGELUActivation: activation,
    llama.LlamaRMSNorm: rms_norm,
    llama.LlamaMLP: gated_mlp,
    llama.LlamaAttention: attention_patch,
    llama.LlamaDecoderLayer: linear,
    mistral.MistralRMSNorm: rms_norm,
    mistral.MistralMLP: gated_mlp,
    mistral.MistralAttention: attention_patch,
    mistral.MistralDecoderLayer: linear,
    qwen2.Qwen2RMSNorm: rms_norm,
    qwen2.Qwen2MLP: gated_mlp,
    qwen2.Qwen2Attention: attention_patch,
    qwen2.Qwen2DecoderLayer: linear,
    qwen3.Qwen3RMSNorm: rms_norm,
    qwen3.Qwen3MLP: gated_mlp,
    qwen3.Qwen3Attention: attention_patch,
    qwen3.Qwen3DecoderLayer: linear,
    gemma.GemmaRMSNorm: rms_norm_unit_offset,
    gemma.GemmaMLP: gated_mlp,
    gemma.GemmaAttention: attention_patch,
    gemma.GemmaDecoderLayer: linear,
    gemma2.Gemma2RMSNorm: rms_norm_unit_offset,
    gemma2.Gemma2MLP: gated_mlp,
    gemma2.Gemma2Attention: attention_patch,
    gemma2.Gemma2DecoderLayer: linear,
    gemma3.Gemma3RMSNorm: rms_norm_unit_offset,
    gemma3.Gemma3MLP: gated_mlp,
    gemma3.Gemma3Attention: attention_patch,
    gemma3.Gemma3DecoderLayer: linear,
    phi3.Phi3RMSNorm: rms_norm,
    phi3.Phi3MLP: fused_gated_mlp,
    phi3.Phi3Attention: attention_patch,
    phi3.Phi3DecoderLayer: linear,
    gpt2.GPT2MLP: linear,
    gpt2.GPT2Attention: attention_patch,
    gpt2.GPT2Block: linear,
    gpt_neox.GPTNeoXMLP: linear,
    gpt_neox.GPTNeoXAttention: attention_patch,
    gpt_neox.GPTNeoXLayer: linear,
    opt.OPTAttention: attention_patch,
    opt.OPTDecoderLayer: linear,  # its MLP's layers are its own children
    mixtral.MixtralRMSNorm: rms_norm,
    mixtral.MixtralAttention: attention_patch,
    mixtral.MixtralDecoderLayer: linear,
    mixtral.MixtralSparseMoeBlock: linear,
    mixtral.MixtralTopKRouter: router,
    qwen3_moe.Qwen3MoeRMSNorm: rms_norm,
    qwen3_moe.Qwen3MoeMLP: gated_mlp,
    qwen3_moe.Qwen3MoeAttention: attention_patch,
    qwen3_moe.Qwen3MoeDecoderLayer: linear,
    qwen3_moe.Qwen3MoeSparseMoeBlock: linear,
    qwen3_moe.Qwen3MoeTopKRouter: router,
    vit.ViTMLP: linear,
    vit.ViTAttention: attention_patch,
    vit.ViTLayer: linear,
    deit.DeiTMLP: linear,
    deit.DeiTAttention: attention_patch,
    deit.DeiTLayer: linear,
    swin.SwinMLP: linear,
    swin.SwinRelativePositionBias: linear,  # of weights alone: added to the scores, takes its share of their relevance
    swin.SwinAttention: attention_patch,
    swin.SwinDropPath: linear,
    swin.SwinLayer: linear,  # windows, padding and cyclic shift move tokens
    swin.SwinPatchMerging: linear,  # moves tokens side by side; its norm and layer have rows of their own
    dinov2.Dinov2MLP: linear,
    dinov2.Dinov2Attention: attention_patch,
    dinov2.Dinov2LayerScale: linear,  # by weights
    dinov2.Dinov2DropPath: linear,
    dinov2.Dinov2Layer: linear,
    FirstToken: linear,
    FirstTokenAndMean: linear,
    MeanToken: linear,
    LinearExperts: routed_experts,
    Expert: linear,
    RoutedLinear: linear,
}

_SWITCH = "_lrpq_switch"
_ABSENT = object()


@contextmanager
def apply_rules(
    block: nn.Module, switch: PassSwitch, composite: Mapping[type[nn.Module], Rule] = COMPOSITE
) -> Iterator[None]:
    """Inside the scope, graphs built by ``block`` follow the pass that ``switch`` names when backward runs.

    Only instance attributes of this block's modules change, and all are put back on leaving.
    Values do not change. A scope inside a scope of the same switch does nothing.

    Raises:
        ModelError: a module's class is not in ``composite``, its forward is replaced already, or it follows
            another switch.
    """
    replaced: list[tuple[nn.Module, str, object]] = []
    try:
        # All attributes are found before the first is set: a rule may keep the module's original forward.
        patches = [(module, _patch(name, module, switch, composite)) for name, module in block.named_modules()]
        for module, patch in patches:
            for attribute, value in patch.items():
                replaced.append((module, attribute, module.__dict__.get(attribute, _ABSENT)))
                module.__dict__[attribute] = value
        yield
    finally:
        for module, attribute, original in reversed(replaced):
            if original is _ABSENT:
                del module.__dict__[attribute]
            else:
                module.__dict__[attribute] = original


def _patch(
    name: str, module: nn.Module, switch: PassSwitch, composite: Mapping[type[nn.Module], Rule]
) -> Mapping[str, object]:
    where = f"module {name or '(root)'} of class {type(module).__name__}"
    active = module.__dict__.get(_SWITCH)
    if active is switch:
        return {}
    if active is not None:
        raise ModelError(f"{where} already follows the rules of another switch: leave that scope first")
    rule = composite.get(type(module))
    if rule is None:
        raise ModelError(
            f"{where} has no relevance rule: expected a class of the composite table; add a row for it or "
            "use relevance fisher, which needs no rules"
        )
    if "forward" in module.__dict__:
        raise ModelError(f"the forward of {where} is already replaced on the instance: expected the class's own")
    return {_SWITCH: switch, **rule(module, switch)}
