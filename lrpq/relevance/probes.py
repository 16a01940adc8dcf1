"""Backward sweeps of an image classifier that begin with random roots of the Fisher information of its prediction.

With logits z and p = softmax(z), a small dz changes the prediction by a divergence of 1/2 dz^T (diag p - p p^T) dz. The
gradients here are g = J^T v of random v with E v v^T = diag p - p p^T, so that, whatever changes at one place,

    1/2 E_v [(sum_t g_t . dx_t)^2]

is the image's divergence to second order, all its tokens together. v is diag(sqrt p) e - p (sqrt p . e) with e of
random signs: a root of the matrix times a random vector (Gauss-Newton products by roots: Schraudolph 2002; random
signs: Hutchinson 1990). Labels drawn from p, v = p less a one-hot vector, have the same second moment and far heavier
tails: of an image that the model is sure of, nearly every draw gives nothing, and a rare one all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lrpq.errors import ModelError
from lrpq.model.kept import KeptInputs
from lrpq.model.streaming import BlockStream
from lrpq.relevance.composite import Relevance
from lrpq.relevance.head import sequence_generator
from lrpq.relevance.rules import Pass
from lrpq.relevance.sweep import ProfileSweep, Shard

if TYPE_CHECKING:
    from jaxtyping import Float


class ProbeSweep(ProfileSweep):
    """A sweep of one shard of images, seeded by a draw an image; draws depend on the seed and the image's number."""

    def seed_gradients(self) -> tuple[float, int]:
        """Gradients J^T v at the last block's output; there are no labels, and no loss."""
        (shard,) = self.shards
        with self.stream.head() as (tail, head):
            for position, (first, _) in enumerate(self.batches(shard)):
                with torch.enable_grad():
                    leaf = self.hidden.pop((shard.index, position)).detach().requires_grad_()
                    logits = head(tail(leaf))[:, 0]
                drawn = torch.stack(
                    [
                        root_times(z, random_signs(len(z), sequence_generator(self.seed, first + i)))
                        for i, z in enumerate(logits.detach().cpu())
                    ]
                )
                (gradient,) = torch.autograd.grad(logits, leaf, drawn.to(logits))
                self.upstream[shard.index, position] = {Pass.FISHER: gradient}
                self.on_batch()
        return 0.0, len(shard.tokens)

    def output_gradients(self) -> Float[Tensor, "n t h"]:
        """g of all images at the output of the block that comes next."""
        (shard,) = self.shards
        return torch.cat([self.upstream[shard.index, i][Pass.FISHER] for i in range(len(self.batches(shard)))])

    def pass_through(self, block: int, module: nn.Module) -> None:
        """Walk one block back, looking at nothing."""
        (shard,) = self.shards
        for position in range(len(self.batches(shard))):
            upstream = self.upstream[shard.index, position][Pass.FISHER]
            with torch.enable_grad():
                leaf = self.kept.take((block, shard.index, position)).detach().requires_grad_()
                output = self.stream.run(module, block, leaf)
            (gradient,) = torch.autograd.grad(output, leaf, upstream)
            self.upstream[shard.index, position] = {Pass.FISHER: gradient}
            self.on_batch()


@contextmanager
def probed(
    sweep: type[ProbeSweep],
    stream: BlockStream,
    images: Float[Tensor, "n channels height width"],
    *,
    draw: int,
    seed: int,
    micro_batch: int,
    kept_bytes: int = 8 << 30,
    on_batch: Callable[[], None] = lambda: None,
) -> Iterator[ProbeSweep]:
    """A sweep behind its forward half, ready to walk back; block inputs are kept for the length of the context.

    Args:
        sweep: its class.
        stream: the classifier.
        images: preprocessed.
        draw: number of the draw.
        seed: of all draws.
        micro_batch: images computed at once.
        kept_bytes: host memory for block inputs before they spill to disk.
        on_batch: called whenever the sweep has run a micro-batch.

    Raises:
        ModelError: not an image classifier.
    """
    if stream.family.pooling is None:
        raise ModelError(f"{stream.architecture} does not classify images")
    shard = Shard(index=0, first_window=draw * len(images), tokens=images)
    with KeptInputs(memory_bytes=kept_bytes) as kept:
        made = sweep(
            stream,
            [shard],
            num_shards=1,
            relevance=Relevance.NONE,
            floor=0.0,
            power=1.0,
            seed=seed,
            micro_batch=micro_batch,
            kept=kept,
        )
        made.on_batch = on_batch
        made.embed()
        for block, module in stream.stream(range(stream.num_blocks)):
            made.forward(block, module)
        made.seed_gradients()
        yield made


def random_signs(count: int, generator: torch.Generator) -> Float[Tensor, "k=count"]:
    """1 or -1 with equal chance, float64."""
    return torch.randint(0, 2, (count,), generator=generator).double() * 2 - 1


def root_times(logits: Float[Tensor, "k=classes"], e: Float[Tensor, "k=classes"]) -> Float[Tensor, "k=classes"]:
    """A root of diag p - p p^T times a vector, float64."""
    p = torch.softmax(logits.double(), dim=-1)
    scaled: Tensor = p.sqrt() * e
    return scaled - p * scaled.sum()
