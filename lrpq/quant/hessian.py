"""Relevance-weighted Hessians of the layer-wise error: raw sums, their merging, the damped Cholesky factor.

H = sum_t s_t x_t x_t^T / sum_t s_t. What is kept are the raw sums (sum s x x^T, sum s, number of tokens),
normalised once, at the end. Signed token weights would make H indefinite, so they are refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrpq.errors import QuantizationError
from lrpq.quant.activation_sums import MIN_GPU_ROWS, add_sum, is_split
from lrpq.quant.grid import fetch

if TYPE_CHECKING:
    from jaxtyping import Float

# Row blocks of the symmetric product: b blocks compute (b + 1) / 2b of it, here 56%. More blocks save little
# and make thin matmuls.
NUM_BLOCKS = 8
GPU_BLOCK_ROWS = MIN_GPU_ROWS  # at least
_DAMPING_FACTOR = 10.0
_MAX_DAMPING_STEPS = 5
_FIRST_DAMPING = 1e-6  # where none was asked for and the matrix needs some: about fp32 rounding of its mean
# Range of sums and of H in which fp32 keeps all digits that count: products below 2^-126, which it rounds coarsely, are
# then within rounding of the largest, and quadratic forms of H with vectors near 1 stay finite.
_SMALLEST, _LARGEST = 2.0**-100, 2.0**100


@dataclass(frozen=True, slots=True, kw_only=True)
class HessianSum:
    """Sums over the calibration tokens seen so far."""

    xx: Float[Tensor, "d_in d_in"]
    """sum_t s_t x_t x_t^T in fp32. Only the upper triangle is filled; ``normalized`` mirrors it."""
    weight_sum: float
    """sum_t s_t."""
    num_tokens: int
    x: Float[Tensor, " d_in"] | None = None
    """sum_t s_t x_t in fp64, with which the sums of scaled and shifted inputs follow (lrpq.activations.folding); None
    where nobody asked for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DampedCholesky:
    """Lower L with L L^T = H + damping on the diagonal."""

    L: Float[Tensor, "d_in d_in"]
    damping: float
    """What was added to every diagonal entry, in units of H."""
    num_damping_steps: int
    """How often the damping had to grow tenfold: 0 unless H is badly conditioned."""
    num_dead: int
    """Inputs whose squares are zero (in fp32) on all calibration tokens: a diagonal entry of 1 decouples them."""


def empty_hessian(d_in: int, device: torch.device | str = "cpu", *, with_first: bool = False) -> HessianSum:
    """Sum over no tokens; ``with_first``: of the inputs themselves too."""
    return HessianSum(
        xx=torch.zeros(d_in, d_in, dtype=torch.float32, device=device),
        weight_sum=0.0,
        num_tokens=0,
        x=torch.zeros(d_in, dtype=torch.float64, device=device) if with_first else None,
    )


def accumulate(sums: HessianSum, X: Float[Tensor, "*tokens d_in"], s: Float[Tensor, "*tokens"]) -> HessianSum:
    """Add tokens X with weights s. Changes ``sums.xx`` in place and returns the sums that now hold it.

    X may be bfloat16 or half: it is widened first, so products and sums are fp32 (a bf16 matmul is 2.6 times
    as fast on CPU but rounds its output to 8 bits); on a GPU bfloat16 is multiplied as it is (activation_sums.py).
    TF32 is used only if the caller turned it on. Only upper blocks are computed. The result depends on how tokens are
    cut into calls (fp32 addition): keep the cut fixed.

    Raises QuantizationError for a negative or non-finite weight.
    """
    d_in = sums.xx.shape[0]
    X = X.reshape(-1, d_in)
    s = s.reshape(-1).float()  # before their sum is taken: a weight that fp32 rounds to zero must not count there
    if len(s) != len(X):
        raise QuantizationError(f"{len(s)} token weights for {len(X)} tokens of width {d_in}: give one a token")
    if not bool(((s >= 0) & torch.isfinite(s)).all()):
        raise QuantizationError(
            "token weights must be finite and not negative; take the relevance's magnitude or square"
        )
    step = max(1, -(-d_in // NUM_BLOCKS))
    if is_split(X):
        step = max(step, GPU_BLOCK_ROWS)
        for start in range(0, d_in, step):
            rows = slice(start, start + step)
            add_sum(sums.xx[rows, start:], X[:, rows] * s.unsqueeze(1), X[:, start:])
    else:
        X = X.float()
        sX = X * s.unsqueeze(1)
        for start in range(0, d_in, step):
            sums.xx[start : start + step, start:].addmm_(X[:, start : start + step].T, sX[:, start:])
    return replace(
        sums,
        weight_sum=sums.weight_sum + float(s.sum(dtype=torch.float64)),
        num_tokens=sums.num_tokens + len(X),
        x=None if sums.x is None else sums.x + s.double() @ X.double(),
    )


def merge(a: HessianSum, b: HessianSum) -> HessianSum:
    """Sum over the tokens of both, in new memory. lrpq.shards fixes the order in which parts are merged."""
    return HessianSum(
        xx=a.xx + b.xx,
        weight_sum=a.weight_sum + b.weight_sum,
        num_tokens=a.num_tokens + b.num_tokens,
        x=None if a.x is None or b.x is None else a.x + b.x,
    )


def add(a: HessianSum, b: HessianSum) -> HessianSum:
    """The same sum in the memory of ``a``, which nobody else may hold."""
    return HessianSum(
        xx=a.xx.add_(b.xx),
        weight_sum=a.weight_sum + b.weight_sum,
        num_tokens=a.num_tokens + b.num_tokens,
        x=None if a.x is None or b.x is None else a.x + b.x,
    )


def normalized(sums: HessianSum, *, name: str = "layer") -> Float[Tensor, "d_in d_in"]:
    """H = sum s x x^T / sum s, symmetric, in new memory; zero where all inputs are.

    Raises QuantizationError naming the layer if all weights are zero, or if weights or inputs are not finite or so
    small or large that the sums have lost digits.
    """
    total, largest = sums.weight_sum, float(sums.xx.diagonal().amax())
    if not total > 0:
        raise QuantizationError(f"{name}: its {sums.num_tokens} calibration tokens have no weight; check the relevance")
    ranged = (total, largest, largest / total) if largest else (total,)
    if not all(_SMALLEST <= value <= _LARGEST for value in ranged):
        raise QuantizationError(
            f"{name}: sums over its {sums.num_tokens} calibration tokens leave float32's range (of token weights"
            f" {total:.3g}, of weighted squared inputs {largest:.3g}); check the calibration inputs and the relevance"
        )
    return mirror(replace(sums, xx=sums.xx / total)).xx


def mirror(sums: HessianSum) -> HessianSum:
    """Fill the lower triangle of ``sums.xx`` from the upper, in place, for readers of the full matrix."""
    xx = sums.xx
    step = max(1, -(-len(xx) // NUM_BLOCKS))
    for start in range(0, len(xx), step):
        block = xx[start : start + step, start : start + step]
        block.copy_(block.triu() + block.triu(1).T)
        xx[start + step :, start : start + step] = xx[start : start + step, start + step :].T
    return sums


def damped_cholesky(H: Float[Tensor, "d_in d_in"], *, damping: float = 0.01, name: str = "layer") -> DampedCholesky:
    """Factor H + damping mean(diag H) I, the mean over live inputs, without changing H.

    A matrix that is not positive definite gets ten times the damping, up to five times; every step is
    counted. d_in^3/3 FLOPs. Raises QuantizationError naming the layer when that does not suffice or H is not
    finite; GPTQ code that falls back to rounding here looks like success.
    """
    return factor_damped(H.clone(), damping=damping, name=name)


def factor_damped(H: Float[Tensor, "d_in d_in"], *, damping: float, name: str) -> DampedCholesky:
    """``damped_cholesky`` that may change H, namely its diagonal: a copy less of what can be 3 GB."""
    if not damping >= 0:
        raise QuantizationError(f"{name}: damping must not be negative, got {damping}")
    diagonal = H.diagonal().clone()
    dead = diagonal == 0
    total, sum_of_diagonal, dead_inputs = fetch(
        H.sum(dtype=torch.float64), diagonal.sum(dtype=torch.float64), dead.sum()
    )
    if not math.isfinite(total):
        raise QuantizationError(f"{name}: its Hessian is not finite; check the calibration inputs and the relevance")
    num_dead = int(dead_inputs)
    mean = sum_of_diagonal / max(1, len(diagonal) - num_dead)
    live_diagonal = torch.where(dead, 1.0, diagonal)
    for step in range(_MAX_DAMPING_STEPS + 1):
        relative = damping if step == 0 else max(damping, _FIRST_DAMPING) * _DAMPING_FACTOR**step
        H.diagonal().copy_(live_diagonal + relative * mean)
        L, info = torch.linalg.cholesky_ex(H)
        if bool((info == 0) & torch.isfinite(L.diagonal()).all()):
            return DampedCholesky(L=L, damping=relative * mean, num_damping_steps=step, num_dead=num_dead)
    raise QuantizationError(
        f"{name}: its Hessian is not positive definite even with damping {relative:g}; use more calibration tokens"
    )
