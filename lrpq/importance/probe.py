"""Measured KL divergence of many small changes of a model, in one streamed pass.

Every variant changes layers of one block. Before that block it is the original, so it joins there: V variants spread
over the blocks cost about V/2 forward passes of the blocks and V of the head. Memory: one block's weights, and the
hidden states of all variants.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrpq.errors import QuantizationError
from lrpq.model.streaming import BlockStream

if TYPE_CHECKING:
    from jaxtyping import Float, Int

PROBE_WINDOWS = 4
"""Calibration windows on which methods measure single modules, or blocks."""
BlockVariants = Callable[[int], Mapping[str, Mapping[str, Tensor]]]
"""Block -> name of a variant -> module name -> dense weights that replace the original's."""


@torch.no_grad()
def measure_kl(
    stream: BlockStream, windows: Int[Tensor, "windows length"], variants: BlockVariants, *, micro_batch: int = 1
) -> dict[str, list[float]]:
    """KL(original || variant) of every window, nats per token, by name of the variant.

    Args:
        stream: the original model.
        windows: token ids; the first token of a window is context only.
        variants: asked for once a block, in the order of the blocks.
        micro_batch: windows computed at once.

    Raises:
        QuantizationError: two variants have one name, or logits are not finite.
    """
    batches = list(windows.split(micro_batch))
    with stream.embedding():
        original = [stream.embed(batch) for batch in batches]
    hidden: dict[str, list[Tensor]] = {}
    for index, block in stream.stream(range(stream.num_blocks)):
        for states in hidden.values():
            states[:] = [stream.run(block, index, h) for h in states]
        for name, weights in variants(index).items():
            if name in hidden:
                raise QuantizationError(f"variant {name}: the name is taken; give every variant its own")
            with stream.swapped(block, weights):
                hidden[name] = [stream.run(block, index, h) for h in original]
        original = [stream.run(block, index, h) for h in original]
    found: dict[str, list[float]] = {name: [] for name in hidden}
    with stream.head() as (norm, head):

        def log_probabilities(states: Float[Tensor, "t h"]) -> Float[Tensor, "t vocab"]:
            logits: Tensor = head(norm(states[None]))[0, :-1]
            return logits.float().log_softmax(-1)

        for position, batch in enumerate(batches):
            for row in range(len(batch)):
                p = log_probabilities(original[position][row])
                for name, states in hidden.items():
                    q = log_probabilities(states[position][row])
                    if not bool(torch.isfinite(q).all()):
                        raise QuantizationError(f"variant {name}: its logits are not finite")
                    found[name].append(max(0.0, float((p.exp() * (p - q)).sum(-1).mean())))  # fp32 rounds below zero
    return found
