"""Block-wise reconstruction: codes, scales and activation steps of a block learnt on the error of its outputs.

Blocks are rebuilt in the order of the forward (BRECQ, Li et al. 2021), each when its codes have been found: its inputs
are those behind the quantized blocks before it, its targets the original's outputs. Codes start as they are and move
through a straight-through estimator (parameters), which takes the place of AdaRound's rectified sigmoid (Nagel et al.
2020, arXiv:2004.10568): no second stage has to push numbers to whole ones, and the start loses nothing. Activations can
be left unquantized at random while training (QDrop, Wei et al. 2022, arXiv:2203.05740).

A part of the images is held out of the training. A block stays as it was unless on these both its error and the KL
divergence of the predictions fall; they may have served to find the codes it starts from, which only favours the start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lrpq.activations.apply import quantized_block
from lrpq.activations.calibrate import BlockGrids
from lrpq.errors import CalibrationError, Diverged
from lrpq.model.kept import KeptInputs
from lrpq.model.streaming import BlockStream
from lrpq.relevance.passes import widen
from lrpq.relevance.probes import ProbeSweep, probed
from lrpq.tune.block import BlockTraining, Case, Start, Weights
from lrpq.tune.objective import BlockError, block_error
from lrpq.tune.options import Reconstruction

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockOutcome:
    """Errors in nats an image."""

    block: int
    before: float
    """Held-out error of the start."""
    after: float
    """Of what was kept; never above ``before``."""
    training_before: float
    training_after: float
    kl_before: float
    """KL divergence of the held-out images' predictions with the start, the blocks behind it the original's."""
    kl_after: float
    """Of what was kept; never above ``kl_before``."""
    step: int
    """Steps that what was kept has had; 0: the start was kept."""
    diverged: str | None = None
    """Why training ended early, if it did."""

    @property
    def accepted(self) -> bool:
        """Whether the block changed."""
        return self.step > 0


def divided(num_images: int, options: Reconstruction) -> tuple[Int[Tensor, "images=l"], Int[Tensor, "images=k"]]:
    """Images that are held out, and those that blocks are trained on.

    Raises:
        CalibrationError: too few for both.
    """
    stride = round(1 / options.held_out)
    index = torch.arange(num_images)
    held_out, training = index[index % stride == stride - 1], index[index % stride != stride - 1]
    if not len(held_out) or not len(training):
        raise CalibrationError(f"reconstruction holds out one of {stride} images, and there are {num_images}")
    return held_out, training


class Rebuilder:
    """Called with each block in turn, as lrpq.compare.workbench.Rebuild.

    Args:
        stream: the classifier that codes and grids are of.
        images: to calibrate on, preprocessed.
        grids: by block.
        options: how.
        seed: of gradients, order of images and drops.
        micro_batch: images computed at once where nothing is trained.
        kept: where gradients at the blocks' outputs are kept until they are needed.
        on_step: called whenever a step or a micro-batch is done.

    Raises:
        ModelError: not an image classifier.
        CalibrationError: too few images to hold some out.
    """

    def __init__(
        self,
        stream: BlockStream,
        images: Float[Tensor, "n channels height width"],
        grids: Sequence[BlockGrids],
        options: Reconstruction,
        *,
        seed: int,
        micro_batch: int,
        kept: KeptInputs,
        on_step: Callable[[], None] = lambda: None,
    ) -> None:
        self.held_out, self.training = divided(len(images), options)
        self.stream, self.options, self.seed = stream, options, seed
        self.micro_batch, self.on_step = micro_batch, on_step
        self.grids: list[BlockGrids] = list(grids)
        """By block; those of blocks that were rebuilt are the new ones."""
        self.outcomes: list[BlockOutcome] = []
        self.gradients = kept
        """(block, draw) -> g at the block's output [n, t, h], until the block is rebuilt."""
        for draw in range(options.draws):
            with probed(
                ProbeSweep, stream, images, draw=draw, seed=seed, micro_batch=micro_batch, on_batch=on_step
            ) as sweep:
                for block, module in stream.stream(range(stream.num_blocks - 1, -1, -1)):
                    self.gradients.put((block, draw), sweep.output_gradients())
                    sweep.pass_through(block, module)
        with stream.embedding():
            for size in {
                min(options.batch, len(self.training)),
                *(len(part) % micro_batch for part in (self.held_out, self.training)),
            } - {0}:
                stream.embed(images[:size])  # records how blocks are called
            self.original = torch.cat([stream.embed(part) for part in images.split(micro_batch)])
        """Inputs of the block that comes next in the original."""
        self.quantized = self.original
        """And in the quantized model."""

    @torch.no_grad()
    def __call__(self, block: int, module: nn.Module, codes: Weights) -> Weights:
        """Rebuild a block; its grids, if they change, are in ``grids`` afterwards."""
        objective = self.objective(block)
        target = self.run(block, module, self.original)
        training = BlockTraining(
            self.stream,
            block,
            module,
            Start(codes=codes, grids=self.grids[block]),
            Case(inputs=self.quantized, target=target, error=objective, training=self.training, held_out=self.held_out),
            self.options,
            seed=self.seed,
            micro_batch=self.micro_batch,
            on_step=self.on_step,
        )
        best = start = training.check(0)
        diverged = None
        try:
            for step in training.steps():
                found = training.check(step)
                best = min(best, found, key=lambda check: check.held_out)  # the earlier of equals, and never a NaN
        except Diverged as error:
            diverged = str(error)
        nats = self._divergences(block, module, target, (start.made, best.made))
        if not nats[1] < nats[0]:
            best, nats = start, (nats[0], nats[0])
        self.outcomes.append(
            BlockOutcome(
                block=block,
                before=start.held_out,
                after=best.held_out,
                training_before=start.training,
                training_after=best.training,
                kl_before=nats[0],
                kl_after=nats[1],
                step=best.step,
                diverged=diverged,
            )
        )
        self._advance(block, module, best.made, target)
        return best.made.codes

    @torch.no_grad()
    def pass_by(self, block: int, module: nn.Module, made: Start) -> None:
        """Go on behind a block that was rebuilt earlier, with what was made of it then; it has no outcome here."""
        for draw in range(self.options.draws):
            self.gradients.take((block, draw))
        self._advance(block, module, made, self.run(block, module, self.original))

    def _advance(self, block: int, module: nn.Module, made: Start, target: Tensor) -> None:
        self.grids[block] = made.grids
        self.quantized = self._outputs(block, module, made, self.quantized)
        self.original = target

    def _outputs(self, block: int, module: nn.Module, made: Start, hidden: Tensor) -> Float[Tensor, "n t h"]:
        with quantized_block(self.stream, block, module, made.grids, made.codes):
            return self.run(block, module, hidden)

    def _divergences(
        self, block: int, module: nn.Module, target: Tensor, candidates: tuple[Start, Start]
    ) -> tuple[float, float]:
        """KL of the held-out images, mean in nats, the blocks that follow as they are in the original."""
        inputs = self.quantized[self.held_out]
        hidden = [target[self.held_out], *(self._outputs(block, module, made, inputs) for made in candidates)]
        for index, following in self.stream.stream(range(block + 1, self.stream.num_blocks)):
            hidden = [self.run(index, following, h) for h in hidden]
        with self.stream.head() as (tail, head):
            p, *others = (head(tail(h))[:, 0].double().log_softmax(-1) for h in hidden)
        before, after = (float((p.exp() * (p - q)).sum(-1).mean()) for q in others)
        return before, after

    def objective(self, block: int) -> BlockError:
        """What errors of a block's outputs cost; to be asked for once."""
        gradients = torch.stack([self.gradients.take((block, draw)) for draw in range(self.options.draws)])
        return block_error(widen(gradients), together=self.options.together)

    def run(self, block: int, module: nn.Module, hidden: Float[Tensor, "n t h"]) -> Float[Tensor, "n t h"]:
        """Forward of a block, some images at a time."""
        outputs = []
        for part in hidden.split(self.micro_batch):
            outputs.append(self.stream.run(module, block, part))
            self.on_step()
        return torch.cat(outputs)
