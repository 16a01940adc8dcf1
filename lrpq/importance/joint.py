"""Measured KL divergence of many whole plans, in one streamed pass.

Plans that agree up to a block have the same hidden states behind it, which are computed once: V plans that differ in
two blocks each cost about V/2 forward passes of the blocks and V of the head, V independent ones V of both. Memory: one
block's weights, and the hidden states of all plans that have parted.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrpq.errors import QuantizationError
from lrpq.model.streaming import BlockStream

if TYPE_CHECKING:
    from jaxtyping import Float, Int

BlockWeights = Callable[[int, Hashable], Mapping[str, Tensor]]
"""From a block and a plan's key for it to the dense weights that replace the original's."""


@torch.no_grad()
def joint_kl(
    stream: BlockStream,
    windows: Int[Tensor, "windows length"],
    plans: Mapping[str, Sequence[Hashable]],
    weights: BlockWeights,
    *,
    micro_batch: int = 1,
) -> dict[str, list[float]]:
    """KL(original || plan) of every window, nats per token, by name of the plan.

    Args:
        stream: the original model.
        windows: token ids; the first token of a window is context only.
        plans: name -> a key for every block; None is the original. Equal keys mean equal weights.
        weights: asked for once for every block and key, whichever plans have it.
        micro_batch: windows computed at once.

    Raises:
        QuantizationError: a plan has not one key for every block, or logits are not finite.
    """
    for name, keys in plans.items():
        if len(keys) != stream.num_blocks:
            raise QuantizationError(f"plan {name}: {len(keys)} blocks, but the model has {stream.num_blocks}")
    whole = {tuple(keys) for keys in plans.values()} | {(None,) * stream.num_blocks}
    batches = list(windows.split(micro_batch))
    with stream.embedding():
        hidden: dict[tuple[Hashable, ...], list[Tensor]] = {(): [stream.embed(batch) for batch in batches]}
    for index, block in stream.stream(range(stream.num_blocks)):
        behind: dict[tuple[Hashable, ...], list[Tensor]] = {}
        prefixes = dict.fromkeys(keys[: index + 1] for keys in sorted(whole, key=str))
        for key in dict.fromkeys(prefix[-1] for prefix in prefixes):
            with stream.swapped(block, {} if key is None else weights(index, key)):
                for prefix in (p for p in prefixes if p[-1] == key):
                    behind[prefix] = [stream.run(block, index, h) for h in hidden[prefix[:-1]]]
        hidden = behind
    found: dict[tuple[Hashable, ...], list[float]] = {keys: [] for keys in whole}
    with stream.head() as (norm, head):

        def log_probabilities(states: Float[Tensor, "t h"]) -> Float[Tensor, "t vocab"]:
            logits: Tensor = head(norm(states[None]))[0, :-1]
            return logits.float().log_softmax(-1)

        for position, batch in enumerate(batches):
            for row in range(len(batch)):
                p = log_probabilities(hidden[(None,) * stream.num_blocks][position][row])
                if not bool(torch.isfinite(p).all()):
                    raise QuantizationError("the original's logits are not finite; check the source model")
                for keys in whole:
                    q = log_probabilities(hidden[keys][position][row])
                    if not bool(torch.isfinite(q).all()):
                        raise QuantizationError(f"plan {_name_of(keys, plans)}: its logits are not finite")
                    found[keys].append(max(0.0, float((p.exp() * (p - q)).sum(-1).mean())))  # fp32 rounds below zero
    return {name: list(found[tuple(keys)]) for name, keys in plans.items()}


def _name_of(keys: tuple[Hashable, ...], plans: Mapping[str, Sequence[Hashable]]) -> str:
    return next(name for name, of_plan in plans.items() if tuple(of_plan) == keys)
