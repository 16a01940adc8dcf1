"""A whole tuning: epochs, the windows that are held out, and which epoch is the result."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrpq.errors import CalibrationError, Diverged
from lrpq.model.kept import KeptInputs
from lrpq.model.streaming import BlockStream
from lrpq.quant.grid import QuantizedWeight
from lrpq.tune.options import TuneOptions, rate_factor
from lrpq.tune.sweep import TuneSweep

if TYPE_CHECKING:
    from jaxtyping import Int


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """Divergences from the original, nats a token."""

    training_kl: float | None
    """Mean over the epoch's steps, each before its update; None for the start."""
    held_out_kl: tuple[float, ...]
    """Of every held-out window, behind the epoch."""

    @property
    def held_out_mean(self) -> float:
        """Mean over the held-out windows."""
        return statistics.fmean(self.held_out_kl)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """The epoch that is best on the held-out windows; the start itself where none is better."""

    weights: Mapping[str, QuantizedWeight]
    """By module name, those that tuning started from."""
    vectors: Mapping[str, Tensor]
    """Gains and biases by name of the parameter, in the dtype that computes; empty where they are the original's."""
    best_epoch: int
    """0: nothing beat the start, and ``weights`` are the start's."""
    epochs: tuple[Epoch, ...]
    """The start, then every epoch that ended."""
    held_out: tuple[int, ...]
    """Indices of the held-out windows."""
    diverged: str | None
    """Why training ended early, if it did: the loss or a gradient was not finite."""


def tune(
    stream: BlockStream,
    windows: Int[Tensor, "windows length"],
    start: Mapping[str, QuantizedWeight],
    options: TuneOptions,
    *,
    kept: KeptInputs,
    resident: bool = False,
    on_epoch: Callable[[int, Epoch], None] | None = None,
) -> Tuned:
    """Tune a quantized model on the divergence from the original. The arguments are those of `TuneSweep`.

    Raises:
        CalibrationError: there are fewer than two windows: one is held out.
        QuantizationError: as `TuneSweep`.
    """
    training, held_out = split_windows(len(windows), options)
    sweep = TuneSweep(stream, windows, start, options, kept=kept, resident=resident)
    sweep.prepare()
    epochs = [Epoch(training_kl=None, held_out_kl=tuple(sweep.divergence(held_out)))]
    if on_epoch is not None:
        on_epoch(0, epochs[0])
    best, weights, vectors = 0, dict(start), dict[str, Tensor]()
    per_epoch = -(-len(training) // options.batch)
    generator = torch.Generator().manual_seed(options.seed)
    diverged = None
    for epoch in range(options.epochs):
        order = [training[i] for i in torch.randperm(len(training), generator=generator).tolist()]
        nats: list[float] = []
        try:
            for i in range(per_epoch):
                factor = rate_factor(epoch * per_epoch + i, options.epochs * per_epoch, warm_up=options.warm_up)
                nats += sweep.step(order[i * options.batch : (i + 1) * options.batch], factor)
        except Diverged as error:
            diverged = str(error)
            break
        epochs.append(Epoch(training_kl=statistics.fmean(nats), held_out_kl=tuple(sweep.divergence(held_out))))
        if on_epoch is not None:
            on_epoch(epoch + 1, epochs[-1])
        if epochs[-1].held_out_mean < epochs[best].held_out_mean:  # false for a NaN
            best = epoch + 1
            weights, vectors = sweep.export()
    return Tuned(
        weights=weights,
        vectors=vectors,
        best_epoch=best,
        epochs=tuple(epochs),
        held_out=tuple(held_out),
        diverged=diverged,
    )


def split_windows(num_windows: int, options: TuneOptions) -> tuple[list[int], list[int]]:
    """Windows to train on and windows to hold out, each in rising order; a function of the number and the options.

    Raises:
        CalibrationError: there are fewer than two windows.
    """
    if num_windows < 2:
        raise CalibrationError(f"tuning: {num_windows} window(s); expected 2 at least, for one is held out")
    number = min(max(1, round(options.held_out * num_windows)), num_windows - 1)
    generator = torch.Generator().manual_seed(options.seed)
    order = torch.randperm(num_windows, generator=generator).tolist()
    return sorted(order[number:]), sorted(order[:number])
