"""The attention function named "lrpq_points": the plain computation, with a function at each end of its products.

Kernels do not show the pattern that softmax gives; here queries, keys, values and pattern pass through functions that
look at them or quantize them. Products inside attention stay floating-point: they are simulated by quantized values.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from lrpq.errors import ModelError

if TYPE_CHECKING:
    from jaxtyping import Float

QUERY, KEY, VALUE, PATTERN = "query", "key", "value", "pattern"
POINTS = (QUERY, KEY, VALUE, PATTERN)
MASK = "mask"
"""What is added to the scores [n, heads, t, t], where there is any: a function may look at it; it is not quantized."""
NAME = "lrpq_points"
_POINTS = "_lrpq_points"
Points = Mapping[str, Callable[[Tensor], Tensor]]
"""Point -> function of the tensor there; points that are not named are left alone."""


def keep_points(attention: Any, points: Points) -> None:
    """Have an attention module of transformers compute with these points from now on.

    Raises:
        ModelError: the module does not choose its attention function by a configuration, or has key-value groups.
    """
    config = attention.__dict__.get("config")
    if config is None or getattr(config, "_attn_implementation", None) is None:
        raise ModelError(f"{type(attention).__name__} does not choose its attention function by a configuration")
    if getattr(attention, "num_key_value_groups", 1) != 1:
        raise ModelError(
            f"{type(attention).__name__}: key-value heads that serve several query heads are not quantized"
        )
    if NAME not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(NAME, attention_with_points)
    patched = copy.deepcopy(config)
    patched._attn_implementation = NAME
    attention.config = patched
    attention.__dict__[_POINTS] = points


def attention_with_points(
    module: nn.Module,
    query: Float[Tensor, "n heads t d_head"],
    key: Float[Tensor, "n heads t d_head"],
    value: Float[Tensor, "n heads t d_head"],
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "n t heads d_head"], Float[Tensor, "n heads t t"]]:
    """Attention with transformers' calling convention, in evaluation mode."""
    points: Points = module.__dict__[_POINTS]

    def at(point: str, x: Tensor) -> Tensor:
        return points[point](x) if point in points else x

    query, key, value = at(QUERY, query), at(KEY, key), at(VALUE, value)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores + attention_mask
        at(MASK, attention_mask.expand_as(scores))
    wide = torch.promote_types(scores.dtype, torch.float32)
    pattern = at(PATTERN, torch.softmax(scores, dim=-1, dtype=wide).to(query.dtype))
    return (pattern @ value).transpose(1, 2).contiguous(), pattern


@contextmanager
def with_points(attention: Any, points: Points) -> Iterator[None]:
    """Inside, an attention module of transformers computes with these points; without one nothing changes.

    Raises:
        ModelError: see `keep_points`.
    """
    if attention is None:
        yield
        return
    config = attention.__dict__.get("config")
    keep_points(attention, points)
    try:
        yield
    finally:
        attention.config = config
        del attention.__dict__[_POINTS]
