"""The attention function named "lrpq": any kernel of transformers, with the gradients of q, k and v scaled.

AttnLRP's rules for attention act before the kernel (q and k take a quarter of their gradient, v a half), so
the kernel itself, sdpa or any other, stays as it is: same values, same memory, own derivatives of the softmax and of a
soft cap (Gemma 2; its only kernel here is eager, sdpa has no soft cap and raises).

It is registered in transformers' attention interface *and* in its mask interface. Without a mask function of
the same name transformers builds no mask at all, and a sliding window is lost without a word.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from lrpq.errors import ModelError
from lrpq.relevance.rules import QUERY_KEY, VALUE, PassSwitch, scale_gradient

if TYPE_CHECKING:
    from jaxtyping import Float

ATTENTION_NAME = "lrpq"
_SCOPE = "_lrpq_attention"
AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _AttentionScope:
    """What a patched attention module carries while the rules are applied."""

    switch: PassSwitch
    kernel: AttentionFunction
    """The attention function that the module would have called; its masks are the ones the caller holds."""


def relevance_attention(
    module: nn.Module,
    query: Float[Tensor, "n heads t d_head"],
    key: Float[Tensor, "n heads_kv t d_head"],
    value: Float[Tensor, "n heads_kv t d_head"],
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Float[Tensor, "n t heads d_head"], Tensor | None]:
    """Attention with transformers' calling convention; outside `apply_rules` it is plain sdpa."""
    scope: _AttentionScope | None = module.__dict__.get(_SCOPE)
    if scope is None:
        output: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **options
        )
        return output
    return scope.kernel(
        module,
        scale_gradient(query, QUERY_KEY, scope.switch),
        scale_gradient(key, QUERY_KEY, scope.switch),
        scale_gradient(value, VALUE, scope.switch),
        attention_mask,
        **options,
    )


def register_attention() -> None:
    """Make ``attn_implementation="lrpq"`` known to transformers; doing it again changes nothing.

    Not done on import: importing a module must not change another library.
    """
    if ATTENTION_NAME not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(ATTENTION_NAME, relevance_attention)
    if ATTENTION_NAME not in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


def attention_patch(module: nn.Module, switch: PassSwitch) -> Mapping[str, object]:
    """Instance attributes that send one attention module through `relevance_attention`.

    The module gets its own copy of the configuration; the other blocks, which share the original, keep it.

    Raises:
        ModelError: the module does not choose its attention function through the configuration (alone).
    """
    register_attention()
    config = module.__dict__.get("config")
    name = getattr(config, "_attn_implementation", None)
    if config is None or name is None:
        raise ModelError(
            f"{type(module).__name__} has no config with an attention implementation: expected an attention "
            'module of transformers; load the model with attn_implementation="sdpa"'
        )
    if name == "eager" and getattr(module, "reorder_and_upcast_attn", False):
        # GPT-2 compares the implementation's name itself and then calls a method of its own instead of the function
        raise ModelError(
            f"{type(module).__name__} has reorder_and_upcast_attn, which bypasses the attention function of the "
            'implementation "eager": expected one that the rules can act on; load the model with '
            'attn_implementation="sdpa"'
        )
    patched_config = copy.deepcopy(config)
    patched_config._attn_implementation = ATTENTION_NAME
    scope = _AttentionScope(switch=switch, kernel=_kernel(module, name))
    return {"config": patched_config, _SCOPE: scope}


def _kernel(module: nn.Module, name: str) -> AttentionFunction:
    """Attention function that ``module`` uses under the implementation ``name``."""
    if name == ATTENTION_NAME:
        found: AttentionFunction = sdpa_attention_forward
        return found
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    kernel: AttentionFunction | None = ALL_ATTENTION_FUNCTIONS.get(name, eager)
    if kernel is None:
        raise ModelError(
            f'{type(module).__name__} uses the attention implementation "{name}", unknown to transformers: '
            'expected one of its interface; load the model with attn_implementation="sdpa"'
        )
    return kernel
