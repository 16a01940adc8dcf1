"""Training of one block on the error of its outputs; what it learns is what is stored of its weights and grids."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lrpq.activations.apply import quantized_block
from lrpq.activations.calibrate import BlockGrids
from lrpq.errors import Diverged
from lrpq.model.streaming import BlockStream
from lrpq.quant.grid import QuantizedWeight
from lrpq.tune.grids import GridState, grid_states, on_grids
from lrpq.tune.options import Reconstruction, rate_factor
from lrpq.tune.part import EPSILON, Gradients, Part, build_part

if TYPE_CHECKING:
    from jaxtyping import Float, Int

Weights = Mapping[str, QuantizedWeight]
ErrorOf = Callable[[Tensor, Tensor], Tensor]
"""From errors of outputs [k, t, h] and the images they are of to what they cost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What of a block is stored."""

    codes: Weights
    """By module."""
    grids: BlockGrids


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What a block is trained and judged on."""

    inputs: Float[Tensor, "n t h"]
    """Behind the quantized blocks before it."""
    target: Float[Tensor, "n t h"]
    """The original's outputs."""
    error: ErrorOf
    training: Int[Tensor, "images=k"]
    held_out: Int[Tensor, "images=l"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What training has come to."""

    step: int
    """Steps taken."""
    held_out: float
    """Error."""
    training: float
    made: Start


class BlockTraining:
    """Args:
    stream: the model.
    block: index.
    module: the block with its original weights, which stay.
    start: codes and grids to begin with.
    case: inputs, targets and their error; the stream has embedded batches of the sizes that are run.
    options: how.
    seed: of the order of images and of drops.
    micro_batch: images computed at once where nothing is trained.
    on_step: called after every step, and every micro-batch of a check.
    """

    def __init__(
        self,
        stream: BlockStream,
        block: int,
        module: nn.Module,
        start: Start,
        case: Case,
        options: Reconstruction,
        *,
        seed: int,
        micro_batch: int,
        on_step: Callable[[], None] = lambda: None,
    ) -> None:
        self.stream, self.block, self.module = stream, block, module
        self.on_step = on_step
        self.start, self.case, self.options = start, case, options
        self.micro_batch = micro_batch
        tensors = module.state_dict()
        self.part: Part = build_part(
            tensors,
            {key: f"{stream.block_names[block]}.{key}" for key in tensors},
            (),
            start.codes,
            options.tuning,
            dtype=stream.dtype,
            device=stream.device,
            resident=True,
        )
        self.states: dict[str, GridState] = grid_states(start.grids)
        self.shifts = [state.shift for state in self.states.values() if state.shift is not None]
        self.optimizer = (
            torch.optim.Adam(self.shifts, lr=options.grid_rate, betas=options.tuning.betas, eps=EPSILON)
            if self.shifts
            else None
        )
        self.generator = torch.Generator().manual_seed(seed * 1_000_003 + block)

    def check(self, step: int) -> Check:
        """Errors now, computed as the model will compute."""
        made = self.start
        if step > 0:
            made = Start(codes=self.part.export()[0], grids={n: state.export() for n, state in self.states.items()})
        held_out, training = (self._error(made, images) for images in (self.case.held_out, self.case.training))
        return Check(step=step, held_out=held_out, training=training, made=made)

    def steps(self) -> Iterator[int]:
        """Train, and yield the number of steps taken whenever it is time for a check.

        Raises:
            Diverged: a gradient is not finite.
        """
        options = self.options
        if not self.part.trained and not self.shifts:
            return
        due = {round(options.steps * (i + 1) / options.checks) for i in range(options.checks)}
        for step in range(options.steps):
            self._step(rate_factor(step, options.steps, warm_up=options.tuning.warm_up))
            self.on_step()
            if step + 1 in due:
                yield step + 1

    def gradients(self, images: Int[Tensor, "some=k"]) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Of some images' error: at the dense weights by name in the block, and at the grids' shifts."""
        hidden = self.case.inputs[images]
        arguments = self.stream.call_arguments(self.block, (hidden.shape[0], hidden.shape[1]))
        trained = self.part.trained
        grids = on_grids(self.stream, self.block, self.module, self.states, self._dropped)
        with self.part.present() as tensors, grids, torch.enable_grad():
            leaves = {key: tensors[key].detach().requires_grad_() for key in trained}
            output = functional_call(self.module, {**tensors, **leaves}, (hidden,), arguments)
            output = cast("Tensor", output[0] if isinstance(output, tuple) else output)
            loss = self.case.error(output - self.case.target[images], images)
            found = torch.autograd.grad(loss, [*leaves.values(), *self.shifts])
        return dict(zip(trained, found, strict=False)), list(found[len(trained) :])

    def _step(self, factor: float) -> None:
        images = self.case.training
        order = torch.randperm(len(images), generator=self.generator)[: self.options.batch]
        at_weights, at_shifts = self.gradients(images[order])
        with self.part.present():
            self.part.update(Gradients(at_weights), factor)
        if self.optimizer is None:
            return
        for shift, gradient in zip(self.shifts, at_shifts, strict=True):
            if not bool(torch.isfinite(gradient)):
                raise Diverged(f"block {self.block}: the gradient of a grid is not finite; lower the learning rates")
            shift.grad = gradient
        self.optimizer.param_groups[0]["lr"] = self.options.grid_rate * factor
        self.optimizer.step()
        for state in self.states.values():
            state.project()

    def _dropped(self, x: Tensor) -> Tensor:
        if self.options.drop == 0:
            return torch.zeros((), dtype=torch.bool, device=x.device)
        return (torch.rand(x.shape, generator=self.generator) < self.options.drop).to(x.device)

    def _error(self, made: Start, images: Tensor) -> float:
        total = 0.0
        with quantized_block(self.stream, self.block, self.module, made.grids, made.codes):
            for part in torch.split(images, self.micro_batch):
                output = self.stream.run(self.module, self.block, self.case.inputs[part])
                total += len(part) * float(self.case.error(output - self.case.target[part], part))
                self.on_step()
        return total / len(images)
