"""Top-1 accuracy and KL divergence of variants of an image classifier, streamed block by block beside the original."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lrpq.errors import CheckpointError, ModelError
from lrpq.model.streaming import BlockStream

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

Variant = Callable[[int, nn.Module], AbstractContextManager[None]]
"""From a block's index and the block to a scope inside which it is the variant's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageScores:
    """Of one variant, an entry an image."""

    right: Bool[Tensor, " n"]
    """The likeliest class is the image's."""
    agrees: Bool[Tensor, " n"]
    """The likeliest class is the original's."""
    kl_nats: Float[Tensor, " n"]
    """KL(original || variant), float64."""

    @property
    def top1(self) -> float:
        """Share of images that are right."""
        return float(self.right.double().mean())


def score_images(
    stream: BlockStream,
    images: Float[Tensor, "n channels height width"],
    labels: Int[Tensor, "images=n"],
    variants: Mapping[str, tuple[BlockStream, Variant]],
    *,
    micro_batch: int = 100,
) -> dict[str, ImageScores]:
    """Scores of the original (under "reference") and of variants, each of a model of its own, such as a folded one.

    Raises:
        ModelError: not an image classifier.
        CheckpointError: a variant gives logits that are not finite.
    """
    if stream.family.pooling is None:
        raise ModelError(f"{stream.architecture} does not classify images")
    original = class_logits(stream, images, None, micro_batch=micro_batch)
    logits = {"reference": original} | {
        name: class_logits(other, images, variant, micro_batch=micro_batch)
        for name, (other, variant) in variants.items()
    }
    p = original.double().log_softmax(-1)
    scores = {}
    for name, found in logits.items():
        if not bool(torch.isfinite(found).all()):
            raise CheckpointError(f"variant {name}: logits are not finite on the evaluation images")
        q = found.double().log_softmax(-1)
        likeliest = found.argmax(-1)
        scores[name] = ImageScores(
            right=likeliest == labels,
            agrees=likeliest == original.argmax(-1),
            kl_nats=(p.exp() * (p - q)).sum(-1),
        )
    return scores


@torch.no_grad()
def class_logits(
    stream: BlockStream,
    images: Float[Tensor, "n channels height width"],
    variant: Variant | None,
    *,
    micro_batch: int = 100,
) -> Float[Tensor, "n classes"]:
    """Logits on the host; every block is read once."""
    with stream.embedding():
        hidden = [stream.embed(batch) for batch in images.split(micro_batch)]
    for index, block in stream.stream(range(stream.num_blocks)):
        if variant is None:
            hidden = [stream.run(block, index, batch) for batch in hidden]
            continue
        with variant(index, block):
            hidden = [stream.run(block, index, batch) for batch in hidden]
    with stream.head() as (tail, head):
        return torch.cat([head(tail(batch))[:, 0].float().cpu() for batch in hidden])
