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
    diverged: str | None
    """Why training ended early, if it did: the loss or a gradient was not finite."""


def tune(
    stream: BlockStream,
    windows: Int[Tensor, "windows length"],
    held_out: Int[Tensor, "held_out length"],
    start: Mapping[str, QuantizedWeight],
    options: TuneOptions,
    *,
    kept: KeptInputs,
    resident: bool = False,
    on_epoch: Callable[[int, Epoch], None] | None = None,
) -> Tuned:
    """Tune a quantized model on the divergence from the original.

    Args:
        stream: the original model.
        windows: tokens to train on.
        held_out: tokens of the same length that choose the epoch. Neither the quantization nor the tuning may have seen
            them: on windows that GPTQ was calibrated on the start is better than elsewhere, and whatever moves away
            from that fit looks like a loss.
        start: the quantized weights by module name.
        options: what is trained and how fast.
        kept: where block inputs are kept during a step.
        resident: as for `TuneSweep`.
        on_epoch: called with the number of every epoch that ended, 0 for the start.

    Raises:
        CalibrationError: no windows to train on, none held out, or windows of different lengths.
        QuantizationError: as `TuneSweep`.
    """
    if not len(windows) or not len(held_out) or windows.shape[1] != held_out.shape[1]:
        raise CalibrationError(
            f"tuning: {tuple(windows.shape)} tokens to train on and {tuple(held_out.shape)} held out; expected windows "
            "of one length in both"
        )
    rest = range(len(windows), len(windows) + len(held_out))
    sweep = TuneSweep(stream, torch.cat([windows, held_out]), start, options, kept=kept, resident=resident)
    sweep.prepare()
    epochs = [Epoch(training_kl=None, held_out_kl=tuple(sweep.divergence(rest)))]
    if on_epoch is not None:
        on_epoch(0, epochs[0])
    best, weights, vectors = 0, dict(start), dict[str, Tensor]()
    per_epoch = -(-len(windows) // options.batch)
    generator = torch.Generator().manual_seed(options.seed)
    diverged = None
    for epoch in range(options.epochs):
        order = torch.randperm(len(windows), generator=generator).tolist()
        nats: list[float] = []
        try:
            for i in range(per_epoch):
                factor = rate_factor(epoch * per_epoch + i, options.epochs * per_epoch, warm_up=options.warm_up)
                nats += sweep.step(order[i * options.batch : (i + 1) * options.batch], factor)
        except Diverged as error:
            diverged = str(error)
            break
        epochs.append(Epoch(training_kl=statistics.fmean(nats), held_out_kl=tuple(sweep.divergence(rest))))
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
        diverged=diverged,
    )
