"""Random weights and Hessians with the traits that make layers of language models hard to round.

Weights: Gaussian of variance 1 / d_in, input columns scaled log-normally (sigma 0.3), one weight in a thousand five
times as large. Inputs: a common part of rank d / 32 as strong as the part of each channel's own, channels scaled
log-normally (sigma 1), one channel in 256 twenty times as large. Speed does not depend on any of it; losses do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrpq.quant.hessian import accumulate, empty_hessian, normalized

WEIGHT_SIGMA, WEIGHT_OUTLIERS, WEIGHT_FACTOR = 0.3, 1e-3, 5.0
CHANNEL_SIGMA, CHANNEL_EVERY, CHANNEL_FACTOR = 1.0, 256, 20.0
RANK_SHARE = 32
TOKENS_A_CHANNEL = 2
"""Tokens of a Hessian for each of its inputs: full rank, badly conditioned."""
_CHUNK, _ROWS = 8192, 4096
"""Tokens and rows drawn at once."""


def generator(seed: int, device: torch.device) -> torch.Generator:
    """Of random numbers on the device itself."""
    return torch.Generator(device).manual_seed(seed)


def weights(d_out: int, d_in: int, *, seed: int, device: torch.device) -> Tensor:
    """W [d_out, d_in], float32."""
    g = generator(seed, device)
    W = torch.randn(d_out, d_in, generator=g, device=device)
    W.mul_(torch.randn(d_in, generator=g, device=device).mul_(WEIGHT_SIGMA).exp_().mul_(d_in**-0.5))
    for start in range(0, d_out, _ROWS):
        rows = W[start : start + _ROWS]
        large = torch.rand(rows.shape, generator=g, device=device) < WEIGHT_OUTLIERS
        rows[large] *= WEIGHT_FACTOR
    return W


def channel_scales(d: int, *, seed: int, device: torch.device) -> Tensor:
    """Standard deviation of every input channel."""
    g = generator(seed, device)
    scales = torch.randn(d, generator=g, device=device).mul_(CHANNEL_SIGMA).exp_()
    outliers = torch.randperm(d, generator=g, device=device)[: max(1, d // CHANNEL_EVERY)]
    scales[outliers] *= CHANNEL_FACTOR
    return scales


def hessian(d: int, *, seed: int, device: torch.device) -> Tensor:
    """H [d, d], float32, of ``TOKENS_A_CHANNEL`` d tokens of equal weight, by the project's own sums."""
    g = generator(seed, device)
    scales = channel_scales(d, seed=seed + 1, device=device)
    rank = max(1, d // RANK_SHARE)
    mixing = torch.randn(rank, d, generator=g, device=device) * rank**-0.5
    sums = empty_hessian(d, device)
    left = TOKENS_A_CHANNEL * d
    while left:
        tokens = min(_CHUNK, left)
        common = torch.randn(tokens, rank, generator=g, device=device) @ mixing
        X = (torch.randn(tokens, d, generator=g, device=device) + common) * scales
        sums = accumulate(sums, X, torch.ones(tokens, device=device))
        left -= tokens
    H: Tensor = normalized(sums, name="random inputs")
    return H
