"""Channel scales from activations and weights, one exponent for the whole model (SmoothQuant+).

s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) for input channel j, with the maxima over calibration tokens and over all
outputs of the layers that read the site (Xiao et al. 2023, SmoothQuant, arXiv:2211.10438). As in SmoothQuant+ (Pan et
al. 2023, arXiv:2312.03788) weights alone are quantized, and alpha is the one with which the whole model, rounded to
nearest, is best on the calibration tokens.

Deviations: best means the lowest KL divergence to the original, which is less noisy than the loss of the text; plain
rounding without any scale is among the candidates, and wins ties; key-value heads with several query heads take the
maxima over those heads. A channel whose inputs or weights are all zero keeps the factor 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrpq.evaluate.divergence import BlockWeights, Summary, score_windows, summarize
from lrpq.model.layers import Choice
from lrpq.model.streaming import BlockStream
from lrpq.quant.grid import Grid
from lrpq.quant.rtn import round_to_nearest
from lrpq.transform.folds import SkippedPair
from lrpq.transform.inputs import site_sums
from lrpq.transform.smoothing import LayerScale, Pair, PairScale, Smoothing, layer_scales, smoothable_pairs

if TYPE_CHECKING:
    from jaxtyping import Float, Int

ALPHAS = tuple(i / 20 for i in range(21))
"""SmoothQuant+'s step of 0.05, both ends included."""
PLAIN = "plain"
"""The candidate without scales, among the names of those with one: ``str(alpha)``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SmoothQuantSearch:
    """Factors for a model, and what every exponent gave."""

    smoothing: Smoothing
    """Without any pair where plain rounding is the best."""
    alpha: float | None
    """The chosen exponent; None where no scale is better than none."""
    candidates: Mapping[str, Summary]
    """``str(alpha)``, and ``PLAIN`` -> scores of the rounded model on the calibration windows."""


def search_smoothquant(
    stream: BlockStream,
    windows: Int[Tensor, "windows length"],
    choice: Choice,
    *,
    alphas: Sequence[float] = ALPHAS,
    grid: Grid = Grid.SYMMETRIC,
) -> SmoothQuantSearch:
    """Choose one exponent by the whole model, all of whose blocks' layers are rounded.

    The candidates go through the model together, so a block is read once for all of them; the hidden states of every
    candidate are held.

    Args:
        stream: the original.
        windows: calibration tokens.
        choice: bits and group size that layers are rounded to.
        alphas: exponents to try.
        grid: codes that layers are rounded to; symmetric ones take absmax scales, others a searched scale.

    Raises:
        ModelError: the architecture is not supported; it says why.
        CalibrationError: there are no windows.
        QuantizationError: the choice does not fit a layer.
    """
    smoothable_pairs(stream, 0)  # refuses an architecture before any forward
    scales: dict[float, list[PairScale]] = {alpha: [] for alpha in alphas}
    skipped: list[SkippedPair] = []
    for block, largest in site_sums(stream, windows, empty=_empty, add=_add, merge=torch.maximum):
        pairs, left_out = smoothable_pairs(stream, block)
        skipped += left_out
        for pair in pairs:
            weights = torch.stack([stream.weight(layer).abs().amax(0).cpu() for layer in pair.layers]).amax(0)
            for alpha in alphas:
                factor = smoothquant_factor(pair, largest[pair.site], weights, alpha)
                scales[alpha].append(PairScale(pair=pair, factor=factor, alpha=alpha))
    variants = rounded_variants(stream, scales, choice, grid=grid)
    scores = score_windows(stream, windows, variants)
    candidates = {name: summarize(scores[name]) for name in variants}
    best = min(candidates, key=lambda name: candidates[name].kl_nats)  # the first of equals: plain
    found = None if best == PLAIN else float(best)
    chosen = () if found is None else tuple(scales[found])
    return SmoothQuantSearch(
        smoothing=Smoothing(scales=chosen, skipped=tuple(skipped)), alpha=found, candidates=candidates
    )


def smoothquant_factor(
    pair: Pair,
    inputs: Float[Tensor, "columns=d_in"],
    weights: Float[Tensor, "columns=d_in"],
    alpha: float,
) -> Float[Tensor, "channels=factors"]:
    """max|X_j|^alpha / max|W_j|^(1 - alpha); 1 for a channel that is zero in either."""
    X = pair.by_head(inputs.double()).amax(1).flatten()
    W = pair.by_head(weights.double()).amax(1).flatten()
    live = (X > 0) & (W > 0)
    return torch.where(live, X.where(live, 1.0) ** alpha / W.where(live, 1.0) ** (1 - alpha), 1.0)


def rounded_variants(
    stream: BlockStream,
    scales: Mapping[float, Sequence[PairScale]],
    choice: Choice,
    *,
    grid: Grid = Grid.SYMMETRIC,
) -> dict[str, BlockWeights]:
    """Models for ``score_windows``: rounded plainly, and rounded behind each set of scales, as weights of the original.

    A smoothed model whose layers are rounded computes what the original computes with the rounded weights scaled back.
    """

    @lru_cache(maxsize=1)  # every variant asks for the same block in turn
    def originals(block: int) -> dict[str, Tensor]:
        return {layer.name: stream.weight(layer) for layer in stream.block_specs(block)}

    def variant(changed: Mapping[str, LayerScale]) -> BlockWeights:
        def rounded(block: int) -> dict[str, Tensor]:
            found = {}
            for name, W in originals(block).items():
                scale = changed.get(name, LayerScale())
                codes = round_to_nearest(scale.apply(W), choice, grid=grid, name=name)
                found[name] = scale.undo(codes.dequantize(W.dtype))
            return found

        return rounded

    named = {str(alpha): variant(layer_scales(found)) for alpha, found in scales.items()}
    return {PLAIN: variant({}), **named}


def _empty(d_in: int) -> Float[Tensor, "columns=d_in"]:
    return torch.zeros(d_in)


def _add(largest: Float[Tensor, "columns=d_in"], X: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "columns=d_in"]:
    return torch.maximum(largest, X.abs().amax(0).float().cpu())
