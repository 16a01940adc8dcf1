"""The sweeps of one optimizer step: forward with the blocks' inputs kept, divergence, backward with updates.

On the way back every block is computed again on its kept input, with gradients for its own weights, updated at once and
let go: a block's gradient needs its own weights of before the step and nothing of the blocks in front of it, so the
step is that of Adam on the whole model. On the device there are one part's weights, one micro-batch's graph, that
part's gradients and Adam's moments; of the whole batch the gradient at a block's output. On the host: codes and
trained numbers of all parts, the kept inputs, and for every window the first block's input and the original's final
hidden states.

Cost of a step in forward passes F of its windows: forward F, recompute F, backward 2 F; once, F for the original.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lrpq.errors import CalibrationError, Diverged, QuantizationError
from lrpq.model.host_memory import release_freed_memory
from lrpq.model.kept import KeptInputs
from lrpq.model.streaming import BlockStream
from lrpq.quant.grid import QuantizedWeight
from lrpq.tune.divergence import Top, divergence, divergence_gradient
from lrpq.tune.options import TuneOptions
from lrpq.tune.part import Gradients, Part, build_part

if TYPE_CHECKING:
    from jaxtyping import Float, Int

Weights = dict[str, QuantizedWeight]
Vectors = dict[str, Tensor]


class TuneSweep:
    """A model in training: ``prepare`` once, then ``step``, ``divergence`` and ``export`` as often as wanted.

    Args:
        stream: the original model.
        windows: calibration tokens.
        start: the quantized weights by module name, the head's possibly among them; layers that are not there keep
            the original's weights.
        options: what is trained and how fast.
        kept: where block inputs are kept during a step.
        resident: all parts stay on the device and their dense weights are made once a step instead of twice. Changes
            no result.

    Raises:
        QuantizationError: ``start`` names a layer that the model does not have, or a layer cannot be tuned.
        CalibrationError: the windows predict nothing.
    """

    def __init__(
        self,
        stream: BlockStream,
        windows: Int[Tensor, "windows length"],
        start: Mapping[str, QuantizedWeight],
        options: TuneOptions,
        *,
        kept: KeptInputs,
        resident: bool = False,
    ) -> None:
        if not len(windows) or windows.shape[1] < 2:
            raise CalibrationError(f"tuning: {tuple(windows.shape)} tokens; expected windows of 2 tokens at least")
        head = stream.head_spec
        known = {spec.name: (spec.d_out, spec.d_in) for spec in (*stream.specs, *([] if head is None else [head]))}
        for name, weight in start.items():
            if tuple(weight.codes.shape) != known.get(name):
                raise QuantizationError(
                    f"{name}: codes are {tuple(weight.codes.shape)}, the model has {known.get(name, 'no such layer')}"
                )
        self.stream = stream
        self.windows = windows
        self.start = start
        self.options = options
        self.kept = kept
        self.resident = resident
        self._embedded: list[Tensor] = []
        """Window -> input of the first block [t, h], on the host."""
        self._original: list[Tensor] = []
        """Window -> input of the original's head [t, h], on the host."""
        self._parts: list[Part] = []
        """The blocks', and at last what follows them."""
        self._top: Top
        self._original_head: Mapping[str, Tensor] = {}

    @torch.no_grad()
    def prepare(self) -> None:
        """One forward of the original over all windows; takes from it what training needs, so that nothing of the
        model is read again."""
        hidden = self._embed()
        self._embedded = [window.cpu() for batch in hidden for window in batch]
        for index, block in self.stream.stream(range(self.stream.num_blocks)):
            hidden = [self.stream.run(block, index, h) for h in hidden]
            names = {key: f"{self.stream.family.blocks}.{index}.{key}" for key in block.state_dict()}
            self._parts.append(self._part(block, names))
            release_freed_memory()
        self._prepare_top(hidden)

    def step(self, batch: Sequence[int], factor: float) -> list[float]:
        """One optimizer step on the mean divergence of some windows.

        Args:
            batch: indices of windows.
            factor: of the learning rates.

        Returns:
            The KL of each of these windows before the step, nats a token.

        Raises:
            Diverged: the loss or a gradient is not finite. The parts behind the named one have been updated already:
                go back to an export, not on.
        """
        groups = list(self._groups(batch))
        hidden = self._forward(groups, keep=True)
        gradients, nats = Gradients(), []
        top = self._parts[-1]
        with top.present() as tensors:
            original_head = self._head_of_original(tensors)
            for position, group in enumerate(groups):
                hidden[position], kl = divergence_gradient(
                    self._top,
                    tensors,
                    original_head,
                    hidden[position],
                    self._gathered(self._original, group),
                    trained=top.trained,
                    gradients=gradients,
                    weight=1 / len(batch),
                )
                nats += kl.tolist()
            if not all(map(math.isfinite, nats)):
                raise Diverged("tuning: the divergence is not finite; lower the learning rates")
            top.update(gradients, factor)
        for block in reversed(range(self.stream.num_blocks)):
            self._backward(block, hidden, factor)
        return nats

    @torch.no_grad()
    def divergence(self, windows: Sequence[int]) -> list[float]:
        """KL(original || quantized) of some windows as the model is now, nats a token."""
        groups = list(self._groups(windows))
        hidden = self._forward(groups, keep=False)
        nats: list[float] = []
        with self._parts[-1].present() as tensors:
            original_head = self._head_of_original(tensors)
            for h, group in zip(hidden, groups, strict=True):
                original = self._gathered(self._original, group)
                nats += divergence(self._top, tensors, original_head, h, original).tolist()
        return nats

    def export(self) -> tuple[Weights, Vectors]:
        """The model as it would be stored now: quantized weights by module, trained vectors by parameter."""
        weights: Weights = {}
        vectors: Vectors = {}
        for part in self._parts:
            some_weights, some_vectors = part.export()
            weights |= some_weights
            vectors |= some_vectors
        return {name: weights[name] for name in self.start}, vectors

    def _backward(self, block: int, upstream: list[Tensor], factor: float) -> None:
        part, gradients = self._parts[block], Gradients()
        with part.present() as tensors:
            trained = part.trained
            for position, above in enumerate(upstream):
                leaves = {key: tensors[key].detach().requires_grad_() for key in trained}
                with torch.enable_grad():
                    leaf = self.kept.take((block, position)).detach().requires_grad_()
                    output = self._run(block, leaf, {**tensors, **leaves})
                # materialised: no token may have been sent to an expert
                found = torch.autograd.grad(output, [leaf, *leaves.values()], above, materialize_grads=True)
                upstream[position] = found[0]
                for key, gradient in zip(trained, found[1:], strict=True):
                    gradients.add(key, gradient)
                del found, output, leaf, leaves
            part.update(gradients, factor)
        release_freed_memory()

    @torch.no_grad()
    def _forward(self, groups: Sequence[Sequence[int]], *, keep: bool) -> list[Float[Tensor, "n t h"]]:
        """Outputs of the last block."""
        hidden = [self._gathered(self._embedded, group) for group in groups]
        for block, part in enumerate(self._parts[:-1]):
            with part.present() as tensors:
                for position, h in enumerate(hidden):
                    if keep:
                        self.kept.put((block, position), h)
                    hidden[position] = self._run(block, h, tensors)
        return hidden

    def _run(self, block: int, hidden: Float[Tensor, "n t h"], tensors: Mapping[str, Tensor]) -> Tensor:
        """Forward of a block on these tensors; the module itself holds no weights."""
        arguments = self.stream.call_arguments(block, (hidden.shape[0], hidden.shape[1]))
        output = functional_call(self.stream.blocks[block], dict(tensors), (hidden,), arguments)
        return cast("Tensor", output[0] if isinstance(output, tuple) else output)

    def _embed(self) -> list[Float[Tensor, "n t h"]]:
        """Inputs of the first block; records what blocks are called with for every size of micro-batch there can be."""
        sizes = range(1, min(self.options.micro_batch, len(self.windows)) + 1)
        with self.stream.embedding():
            for size in sizes:
                self.stream.embed(self.windows[:size])
            return [self.stream.embed(batch) for batch in self.windows.split(self.options.micro_batch)]

    def _prepare_top(self, hidden: Sequence[Float[Tensor, "n t h"]]) -> None:
        family, modules = self.stream.family, dict(self.stream.model.named_modules())
        paths = {f"tail.{i}": path for i, path in enumerate(path for path in family.tail if path in modules)}
        with self.stream.head() as (tail, logits):
            self._original = [window.cpu() for batch in hidden for window in tail(batch)]
            self._top = Top([modules[path] for path in paths.values()], modules[family.head], logits)
            self._original_head = {f"head.{key}": x.cpu() for key, x in self._top.head.state_dict().items()}
            paths["head"] = family.head
            names = {
                f"{local}.{key}": f"{path}.{key}" for local, path in paths.items() for key in modules[path].state_dict()
            }
            self._parts.append(self._part(self._top, names))

    def _part(self, module: nn.Module, names: Mapping[str, str]) -> Part:
        return build_part(
            module.state_dict(),
            names,
            {key for key, p in module.named_parameters() if p.ndim == 1},
            self.start,
            self.options,
            dtype=self.stream.dtype,
            device=self.stream.device,
            resident=self.resident,
        )

    def _head_of_original(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The original's head on the device; that of the quantized model where they are the same."""
        if self.stream.family.head not in self.start:
            return {key: tensors[key] for key in self._original_head}
        return {key: x.to(self.stream.device) for key, x in self._original_head.items()}

    def _gathered(self, kept: Sequence[Tensor], group: Iterable[int]) -> Float[Tensor, "n t h"]:
        return torch.stack([kept[i] for i in group]).to(self.stream.device)

    def _groups(self, windows: Sequence[int]) -> Iterable[Sequence[int]]:
        size = self.options.micro_batch
        return (windows[i : i + size] for i in range(0, len(windows), size))
