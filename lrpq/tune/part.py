"""A part of the model in training: one decoder block, or what follows the last one.

A part is all that a forward needs: the weights made of what is stored, and those that nothing changes. It lives on the
host and is on the device only while it computes; a resident part stays there, with its dense weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lrpq.errors import Diverged
from lrpq.quant.grid import QuantizedWeight
from lrpq.relevance.passes import widen
from lrpq.tune.options import Trained, TuneOptions
from lrpq.tune.parameters import LinearState, VectorState, linear_state, vector_state

EPSILON = 1e-15
"""Adam's. A group's share of the divergence is some 1e-7 nats and a code's less: the usual 1e-8 would be the step."""


@dataclass(slots=True, kw_only=True)
class Part:
    """Everything by name of the parameter inside the module that computes the part."""

    linears: Mapping[str, LinearState]
    vectors: Mapping[str, VectorState]
    fixed: Mapping[str, Tensor]
    """Host copies, in the dtype that computes, of what is not trained."""
    optimizer: torch.optim.Adam | None
    """None: nothing of this part is trained."""
    dtype: torch.dtype
    device: torch.device
    resident: bool
    _dense: dict[str, Tensor] | None = None
    """Of a resident part: its tensors on the device."""

    @property
    def trained(self) -> list[str]:
        """Parameters that need a gradient."""
        linears = [key for key, s in self.linears.items() if s.shift is not None or s.latent is not None]
        return [*linears, *self.vectors]

    @contextmanager
    def present(self) -> Iterator[dict[str, Tensor]]:
        """The part's tensors on the device, as a forward needs them, for the length of the context."""
        if self._dense is not None:
            yield self._dense
            return
        self._move(self.device)
        dense = {key: tensor.to(self.device) for key, tensor in self.fixed.items()}
        dense |= {key: state.dense(self.dtype) for key, state in self.linears.items()}
        dense |= {key: state.dense(self.dtype) for key, state in self.vectors.items()}
        if self.resident:
            self._dense = dense
        try:
            yield dense
        finally:
            if not self.resident:
                self._move(torch.device("cpu"))

    def update(self, gradients: Gradients, factor: float) -> None:
        """One step of Adam; to be called while the part is present.

        Args:
            gradients: of the tensors named in ``trained``.
            factor: of the learning rates.

        Raises:
            Diverged: a gradient is not finite; the layer is named and the part is left as it was.
        """
        if self.optimizer is None:
            return
        states: dict[str, LinearState | VectorState] = {**self.linears, **self.vectors}
        for key in self.trained:
            gradient = gradients.sums[key]
            if not bool(torch.isfinite(gradient.sum(dtype=torch.float64))):
                raise Diverged(f"{states[key].name}: the gradient of tuning is not finite; lower the learning rates")
            states[key].set_gradients(gradient)
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for state in self.linears.values():
            state.project()
        if self._dense is not None:
            self._dense |= {key: states[key].dense(self.dtype) for key in self.trained}

    def export(self) -> tuple[dict[str, QuantizedWeight], dict[str, Tensor]]:
        """What is stored, on the host: quantized weights by module, vectors by parameter, names of the whole model."""
        weights = {s.name: s.export() for s in self.linears.values()}
        return (
            {
                name: QuantizedWeight(codes=w.codes.cpu(), scales=w.scales.cpu(), choice=w.choice)
                for name, w in weights.items()
            },
            {s.name: s.export().cpu() for s in self.vectors.values()},
        )

    def _move(self, device: torch.device) -> None:
        states: list[LinearState | VectorState] = [*self.linears.values(), *self.vectors.values()]
        held = [tensor for state in states for tensor in state.tensors()]
        if self.optimizer is not None:
            held += [t for moments in self.optimizer.state.values() for key, t in moments.items() if key != "step"]
        for tensor in held:
            tensor.data = tensor.data.to(device)


@dataclass(slots=True)
class Gradients:
    """Sums over micro-batches, float32 at least: a bfloat16 sum would lose the small ones."""

    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, key: str, gradient: Tensor) -> None:
        """Add one micro-batch's, or one chunk's."""
        if key in self.sums:
            self.sums[key] += gradient
        else:
            self.sums[key] = widen(gradient)


def build_part(
    tensors: Mapping[str, Tensor],
    names: Mapping[str, str],
    vectors: Collection[str],
    start: Mapping[str, QuantizedWeight],
    options: TuneOptions,
    *,
    dtype: torch.dtype,
    device: torch.device,
    resident: bool,
) -> Part:
    """A part that computes what the quantized start computes.

    Args:
        tensors: the original's tensors by name inside the part.
        names: the same names -> names in the whole model.
        vectors: those that are gains or biases.
        start: quantized weights by module; layers that are not there keep the original's.
        options: what is trained, and the learning rates.
        dtype: of the computation.
        device: where it computes.
        resident: keep the part on the device.

    Raises:
        QuantizationError: a layer cannot be tuned.
    """
    linears: dict[str, LinearState] = {}
    trained_vectors: dict[str, VectorState] = {}
    fixed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        module, _, kind = names[key].rpartition(".")
        if kind == "weight" and module in start:
            linears[key] = linear_state(start[module], tensor.cpu(), options.trained, name=module)
        elif key in vectors and Trained.VECTORS in options.trained:
            trained_vectors[key] = vector_state(tensor.cpu(), name=names[key])
        else:
            fixed[key] = tensor.cpu()
    groups = [
        (options.scale_rate, [s.shift for s in linears.values() if s.shift is not None]),
        (options.vector_rate, [s.shift for s in trained_vectors.values()]),
        (options.code_rate, [s.latent for s in linears.values() if s.latent is not None]),
    ]
    return Part(
        linears=linears,
        vectors=trained_vectors,
        fixed=fixed,
        optimizer=_adam(groups, options),
        dtype=dtype,
        device=device,
        resident=resident,
    )


def _adam(groups: Sequence[tuple[float, list[Tensor]]], options: TuneOptions) -> torch.optim.Adam | None:
    found = [{"params": tensors, "rate": rate} for rate, tensors in groups if tensors]
    return torch.optim.Adam(found, betas=options.betas, eps=EPSILON, fused=True) if found else None
