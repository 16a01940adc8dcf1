"""Relevance of an image's patches for a class: the sweeps of the profile, from one logit down to the embedding.

The relevance of a patch is that of its token at the input of the first block, sum over channels of activation times
modified gradient (`attribute.relevance_sum`); the patch embedding below is linear, but for Swin's norm of each patch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from lrpq.errors import ModelError
from lrpq.model.inputs import image_shape
from lrpq.model.pooling import MeanToken
from lrpq.model.streaming import BlockStream
from lrpq.relevance.attribute import relevance_sum
from lrpq.relevance.head import head_gradient, logit_seed
from lrpq.relevance.passes import check_finite, rules_for, run_passes
from lrpq.relevance.rules import Pass, PassSwitch

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchRelevance:
    """Explanations of some images, fp32 or wider."""

    classes: Int[Tensor, " n"]
    """What is explained."""
    logits: Float[Tensor, " n"]
    """Logits of these classes."""
    patches: Float[Tensor, "n rows columns"]
    special: Float[Tensor, "n special"]
    """Relevance of the tokens before the patches: class token, and DeiT's distillation token; Swin has none.

    ``patches`` and ``special`` sum to the logit under `Pass.CP_LRP` in a model without biases."""


def patch_relevance(
    stream: BlockStream,
    images: Float[Tensor, "n channels height width"],
    *,
    running: Pass = Pass.LRP,
    classes: Int[Tensor, "images=n"] | None = None,
) -> PatchRelevance:
    """Explain the logit of a class, by default of the likeliest, by the patches of the image.

    Memory: the inputs of all blocks for these images; give as many as a micro-batch.

    Raises:
        ModelError: the model does not classify images, or its tokens are not a grid of patches behind special ones.
        CalibrationError: the images do not have the size that the model reads.
        QuantizationError: a gradient is not finite.
    """
    if stream.family.pooling is None:
        raise ModelError(f"{stream.architecture} does not classify images: it has no patches to explain by")
    switch, passes = PassSwitch(), tuple(dict.fromkeys((Pass.FISHER, running)))
    hidden = stream.embed(images)
    inputs: list[Tensor] = []
    with torch.no_grad():
        for index, block in stream.stream(range(stream.num_blocks)):
            inputs.append(hidden)
            hidden = stream.run(block, index, hidden)
    with stream.head() as (tail, head):
        with torch.no_grad():
            logits = head(tail(hidden))[:, 0]
        classes = logits.argmax(-1) if classes is None else classes.to(logits.device)
        labels = classes.unsqueeze(-1)
        gradients, _ = head_gradient(tail, head, hidden, switch=switch, passes=passes, labels=labels, seed=logit_seed)
    for index, block in stream.stream(range(stream.num_blocks - 1, -1, -1)):
        with rules_for(block, switch, passes), torch.enable_grad():
            leaf = inputs[index].detach().requires_grad_()
            output = stream.run(block, index, leaf)
        gradients = run_passes(output, leaf, gradients, switch)
        check_finite({(f"block {index}", name): g for name, g in gradients.items()})
    relevance = relevance_sum(inputs[0], gradients[running])
    special = special_tokens(stream, relevance.shape[1])
    return PatchRelevance(
        classes=classes,
        logits=logits.gather(-1, labels).squeeze(-1),
        patches=relevance[:, special:].unflatten(1, patch_grid(stream)),
        special=relevance[:, :special],
    )


def patch_grid(stream: BlockStream) -> tuple[int, int]:
    """Patches in a column and in a row of an image."""
    _, height, width = image_shape(stream.source.config)
    tall, wide = patch_size(stream.source.config)
    return height // tall, width // wide


def patch_size(config: PreTrainedConfig) -> tuple[int, int]:
    """Height and width of a patch, pixels."""
    size = config.patch_size
    tall, wide = size if isinstance(size, list | tuple) else (size, size)
    return tall, wide


def special_tokens(stream: BlockStream, num_tokens: int) -> int:
    """Of an image's tokens at the first block those that stand before its patches.

    Raises:
        ModelError: the others are no grid of patches.
    """
    rows, columns = patch_grid(stream)
    special = num_tokens - rows * columns
    if special < 0 or (special and stream.family.pooling is MeanToken):
        raise ModelError(
            f"{stream.architecture}: {num_tokens} tokens are not {rows} x {columns} patches; the image has to be a "
            "whole number of patches high and wide"
        )
    return special
