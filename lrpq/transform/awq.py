"""Channel scales from activations, one exponent a site (AWQ; Lin et al. 2024, arXiv:2306.00978).

s = mean|X|^alpha a channel, divided by sqrt(max s min s), with the alpha of a grid over [0, 1) that minimises the error
of the site's outputs when its layers are rounded to nearest. alpha = 0 is no scaling; it is kept where nothing is
better.

Deviations: the error is that of the layers' own outputs, sum over the layers of tr(dW H dW^T) with H = mean x x^T,
instead of the output of attention or MLP as a whole, so that inputs need not be kept; weights are not clipped (lrpq's
scales are searched); a channel's mean is floored relative to the largest, not absolutely; key-value heads with several
query heads are scaled too, with the mean over the heads, where AWQ leaves them out.

A layer's rows are scaled as well where it feeds another site. That cancels in the error but for the rounding of scales
to bfloat16, and is left out of the search.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrpq.model.layers import Choice
from lrpq.model.streaming import BlockStream
from lrpq.quant.grid import Grid
from lrpq.quant.hessian import HessianSum, accumulate, empty_hessian, merge, normalized
from lrpq.quant.rtn import round_to_nearest
from lrpq.transform.folds import SkippedPair
from lrpq.transform.inputs import site_sums
from lrpq.transform.smoothing import Pair, PairScale, Smoothing, smoothable_pairs

if TYPE_CHECKING:
    from jaxtyping import Float, Int

ALPHAS = tuple(i / 20 for i in range(20))
"""AWQ's grid."""
FLOOR = 1e-4
"""Smallest mean|X| of a channel, as a share of the largest: one that calibration hardly reaches is not scaled away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSum:
    """Sums over a site's inputs."""

    absolute: Float[Tensor, "columns=d_in"]
    """sum |x|, float64."""
    squares: HessianSum


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteSearch:
    """What was found for one site."""

    block: int
    site: str
    alpha: float
    plain_error: float
    """Mean over tokens of the squared error of the outputs, summed over outputs, of plain rounding."""
    error: float
    """The same behind the chosen scale; not above ``plain_error``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AwqSearch:
    """Factors for a model, and what they gain."""

    smoothing: Smoothing
    sites: tuple[SiteSearch, ...]
    """In the order of blocks; sites with alpha 0 are not in ``smoothing``."""


def search_awq(
    stream: BlockStream,
    windows: Int[Tensor, "windows length"],
    choice: Choice,
    *,
    alphas: Sequence[float] = ALPHAS,
    grid: Grid = Grid.SYMMETRIC,
) -> AwqSearch:
    """Choose every site's scale by the outputs of its rounded layers.

    Args:
        stream: the original.
        windows: calibration tokens.
        choice: bits and group size that layers are rounded to.
        alphas: exponents to try.
        grid: codes that layers are rounded to; symmetric ones take absmax scales, others a searched scale.

    Raises:
        ModelError: the architecture is not supported; it says why.
        CalibrationError: there are no windows.
        QuantizationError: the choice does not fit a layer, or its inputs are not finite.
    """
    smoothable_pairs(stream, 0)  # refuses an architecture before any forward
    found: list[SiteSearch] = []
    scales: list[PairScale] = []
    skipped: list[SkippedPair] = []
    for block, sums in site_sums(stream, windows, empty=partial(_empty, stream.device), add=_add, merge=_merge):
        pairs, left_out = smoothable_pairs(stream, block)
        skipped += left_out
        for pair in pairs:
            inputs = sums[pair.site]
            if not bool(inputs.absolute.any()):
                reason = "all its inputs are zero on the calibration tokens"
                skipped.append(SkippedPair(block=block, site=pair.site, reason=reason))
                continue
            H = normalized(inputs.squares, name=pair.layers[0].name).to(stream.device)
            mean_abs = inputs.absolute / inputs.squares.num_tokens
            weights = [stream.weight(layer) for layer in pair.layers]
            best, searched = search_pair(pair, weights, mean_abs, H, choice, alphas=alphas, grid=grid)
            found.append(searched)
            if best is not None:
                scales.append(best)
    return AwqSearch(smoothing=Smoothing(scales=tuple(scales), skipped=tuple(skipped)), sites=tuple(found))


def search_pair(
    pair: Pair,
    weights: Sequence[Float[Tensor, "d_out d_in"]],
    mean_abs: Float[Tensor, "columns=d_in"],
    H: Float[Tensor, "d_in d_in"],
    choice: Choice,
    *,
    alphas: Sequence[float] = ALPHAS,
    grid: Grid = Grid.SYMMETRIC,
) -> tuple[PairScale | None, SiteSearch]:
    """The best scale of one pair; None where plain rounding is not beaten.

    Args:
        pair: the site.
        weights: of the pair's layers, in their order.
        mean_abs: mean|x| over tokens.
        H: mean x x^T.
        choice: bits and group size.
        alphas: exponents to try.
        grid: codes.

    Raises:
        QuantizationError: the choice does not fit a layer.
    """
    names = [layer.name for layer in pair.layers]

    def error(columns: Float[Tensor, "columns=d_in"]) -> float:
        total = 0.0
        for W, name in zip(weights, names, strict=True):
            factor = columns.to(W)
            rounded = round_to_nearest(W * factor, choice, grid=grid, name=name).dequantize(W.dtype) / factor
            dW = rounded - W
            total += float(((dW @ H) * dW).sum(dtype=torch.float64))
        return total

    plain = error(torch.ones_like(mean_abs))
    best, lowest = None, plain
    for alpha in alphas:
        factor = awq_factor(pair.by_head(mean_abs).mean(1).flatten(), alpha)
        if bool((factor == 1).all()):
            continue
        found = error(pair.on_inputs(factor))
        if found < lowest:
            best, lowest = PairScale(pair=pair, factor=factor, alpha=alpha), found
    alpha = 0.0 if best is None else best.alpha
    return best, SiteSearch(block=pair.block, site=pair.site, alpha=alpha, plain_error=plain, error=lowest)


def awq_factor(mean_abs: Float[Tensor, "channels=factors"], alpha: float) -> Float[Tensor, "channels=factors"]:
    """mean|X|^alpha, its largest and smallest value at equal distance from 1 on a logarithmic scale."""
    factor = mean_abs.double().clamp(min=FLOOR * float(mean_abs.max())) ** alpha
    return factor / (factor.max() * factor.min()).sqrt()


def _empty(device: torch.device, d_in: int) -> InputSum:
    return InputSum(absolute=torch.zeros(d_in, dtype=torch.float64), squares=empty_hessian(d_in, device))


def _add(sums: InputSum, X: Float[Tensor, "tokens d_in"]) -> InputSum:
    return InputSum(
        absolute=sums.absolute + X.abs().sum(0, dtype=torch.float64).cpu(),
        squares=accumulate(sums.squares, X, torch.ones(len(X), dtype=torch.float32, device=X.device)),
    )


def _merge(a: InputSum, b: InputSum) -> InputSum:
    return InputSum(absolute=a.absolute + b.absolute, squares=merge(a.squares, b.squares))
