"""Experts that too few calibration tokens were sent to, and what they are quantized with instead of their own Hessian.

A Hessian of a handful of tokens fits the codes to those tokens. An expert is starved below either of two gates: a share
of all calibration tokens, and a number of tokens for each of its inputs. Its gate and up projections read what all
experts of the block read, so the sum over all of them takes the place of its own. The inputs of its down projection are
its own neurons, which no other expert has: they are taken to be uncorrelated and alike, which is rounding to the
nearest with searched scales.
"""

from __future__ import annotations

import enum

import torch

from lrpq.quant.hessian import HessianSum

MIN_TOKEN_SHARE = 1e-3
"""Of all calibration tokens."""
MIN_TOKENS_PER_INPUT = 1.0


class Evidence(enum.Enum):
    """What an expert is quantized by."""

    OWN = "own"
    POOLED = "pooled"
    """The tokens of all experts of its block."""
    NONE = "none"
    """No tokens: rounded to the nearest."""
    UNWEIGHTED = "unweighted"
    """Of any layer: its own tokens, all alike, for no gradient reaches it."""


def is_starved(num_tokens: int, *, d_in: int, total_tokens: int) -> bool:
    """Whether an expert of ``d_in`` inputs saw too few of the ``total_tokens``."""
    return num_tokens < max(MIN_TOKEN_SHARE * total_tokens, MIN_TOKENS_PER_INPUT * d_in, 1)


def hessian_of_expert(own: HessianSum, pooled: HessianSum | None, *, total_tokens: int) -> tuple[HessianSum, Evidence]:
    """The sums to quantize an expert's layer by, and where they come from.

    Args:
        own: sums over the tokens that were sent to the expert.
        pooled: sums over all experts of the block, of a layer whose inputs they share; else None.
        total_tokens: calibration tokens of the run.
    """
    d_in = own.xx.shape[0]
    if not is_starved(own.num_tokens, d_in=d_in, total_tokens=total_tokens) and own.weight_sum > 0:
        return own, Evidence.OWN
    if pooled is not None and pooled.weight_sum > 0:
        return pooled, Evidence.POOLED
    scale = float(own.xx.diagonal().mean()) / own.weight_sum if own.weight_sum > 0 else 1.0
    white = torch.eye(d_in, dtype=own.xx.dtype, device=own.xx.device) * (scale if scale > 0 else 1.0)
    return HessianSum(xx=white, weight_sum=1.0, num_tokens=own.num_tokens), Evidence.NONE
