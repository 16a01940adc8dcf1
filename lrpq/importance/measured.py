"""Costs that are measured on the model instead of estimated: exact about one layer, blind to how layers meet."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrpq.importance.probe import measure_kl
from lrpq.model.layers import Choice, LinearSpec
from lrpq.model.streaming import BlockStream
from lrpq.quant.grid import QuantizedWeight

if TYPE_CHECKING:
    from jaxtyping import Int

NOISE = 0.05
"""Relative size t of the noise that a factor is fitted by, |noise|^2 = t^2 |W|^2: about the error of 4 bits."""

Candidates = Callable[[LinearSpec], Sequence[QuantizedWeight]]


def one_at_a_time(
    stream: BlockStream,
    windows: Int[Tensor, "windows length"],
    candidates: Candidates,
    choices: Sequence[Choice],
    *,
    micro_batch: int = 1,
) -> dict[str, dict[Choice, float]]:
    """AdaQuant's loss table (Hubara et al. 2020, arXiv:2006.10518): KL when one layer alone is quantized; nats a token.

    Module name -> choice -> mean over windows. Of the candidates, only ``choices`` are measured.
    """

    def variants(block: int) -> dict[str, dict[str, Tensor]]:
        return {
            f"{spec.name}|{q.choice}": {spec.name: q.dequantize(stream.dtype)}
            for spec in stream.block_specs(block)
            for q in candidates(spec)
            if q.choice in choices
        }

    measured = measure_kl(stream, windows, variants, micro_batch=micro_batch)
    names = {str(choice): choice for choice in choices}
    table: dict[str, dict[Choice, float]] = {}
    for name, values in measured.items():
        module, choice = name.rsplit("|", 1)
        table.setdefault(module, {})[names[choice]] = statistics.fmean(values)
    return table


def noise_factors(
    stream: BlockStream,
    windows: Int[Tensor, "windows length"],
    *,
    seed: int,
    noise: float = NOISE,
    micro_batch: int = 1,
) -> dict[str, float]:
    """HIGGS' linear factors (Malinovskii et al. 2024, arXiv:2411.17525): KL per relative squared error of each layer.

    Gaussian noise with |noise|^2 = t^2 |W|^2 is added to one layer at a time; factor = KL / t^2, nats. Noise is a
    function of the seed and the module's name alone.
    """

    def variants(block: int) -> dict[str, dict[str, Tensor]]:
        return {
            spec.name: {spec.name: _noisy(stream, spec, seed=seed, noise=noise)} for spec in stream.block_specs(block)
        }

    measured = measure_kl(stream, windows, variants, micro_batch=micro_batch)
    return {name: statistics.fmean(values) / noise**2 for name, values in measured.items()}


def relative_error(W: Tensor, quantized: QuantizedWeight) -> float:
    """|W - Q|^2 / |W|^2; 0 for a layer of zeros."""
    size = float(W.square().sum(dtype=torch.float64))
    return float((W - quantized.dequantize(W.dtype)).square().sum(dtype=torch.float64)) / size if size > 0 else 0.0


def filled(
    table: Mapping[str, Mapping[Choice, float]], estimated: Mapping[str, Mapping[Choice, float]]
) -> dict[str, dict[Choice, float]]:
    """A table of measurements with the choices that were not measured put in.

    An estimate of the module, scaled so that it meets the measurement of the module's widest measured choice.
    """
    found: dict[str, dict[Choice, float]] = {}
    for name, costs in estimated.items():
        known = table[name]
        anchor = max(known)
        scale = known[anchor] / costs[anchor] if costs[anchor] > 0 else 1.0
        found[name] = {choice: known.get(choice, cost * scale) for choice, cost in costs.items()}
    return found


def _noisy(stream: BlockStream, spec: LinearSpec, *, seed: int, noise: float) -> Tensor:
    W = stream.weight(spec)
    digest = hashlib.sha256(f"lrpq noise {seed}:{spec.name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    added = torch.randn(W.shape, generator=generator).to(W.device)
    changed: Tensor = W + added * (noise * W.norm() / added.norm())
    return changed
