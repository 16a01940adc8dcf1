"""Difficult numbers through the whole chain: each ends finite, the same every time and counted, or in a named error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from lrpq.errors import QuantizationError
from lrpq.model.kept import KeptInputs
from lrpq.model.layers import Choice
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.streaming import BlockStream
from lrpq.quant.gptq import Factor, factorize, gptq, loss, predicted_cost
from lrpq.quant.grid import Grid, QuantizedWeight, code_range, power_of_two
from lrpq.quant.hessian import accumulate, empty_hessian, merge, normalized
from lrpq.quant.packing import pack, storage_bits, unpack
from lrpq.quant.rtn import round_to_nearest
from lrpq.refine.quantize import Refined, quantize_refined
from lrpq.refine.sweep import RefineSweep, SiteProducts, merge_products
from lrpq.relevance.attribute import ModuleStats
from lrpq.relevance.composite import Relevance
from lrpq.relevance.rules import Pass
from lrpq.relevance.sweep import ProfileSweep, Shard, merge_block_sums
from lrpq.relevance.weights import token_weights
from lrpq.shards import root

BITS = (2, 3, 4, 5, 6, 8)
D_OUT, D_IN, TOKENS = 6, 128, 40
FEW = settings(max_examples=20, deadline=None, derandomize=True)
NAME = "model.layers.3.mlp.up_proj"
CODABLE = (Grid.SYMMETRIC, Grid.SIGNED)


def choices_of(d_in: int) -> list[Choice]:
    sizes = [size for size in (32, 64, 128, -1) if d_in % size == 0]
    return [Choice(bits=bits, group_size=size) for bits in BITS for size in sizes]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- difficult layers -----------------------------------------------------------------------------


def weight(kind: str, d_out: int = D_OUT, d_in: int = D_IN) -> Tensor:
    W = normal(d_out, d_in, seed=1)
    if kind == "outliers":
        W[:, ::17] *= 1e4
        W[0] *= 1e4
    elif kind == "zero":
        W.zero_()
    elif kind == "zero groups":
        W[:, : d_in // 2] = 0
        W[-1] = 0
    elif kind == "constant":
        W.fill_(-0.3)
    elif kind == "denormal":
        W *= 1e-40
    elif kind == "tiny":
        W *= 1e-30
    elif kind == "huge":
        W *= 1e30
    elif kind == "1e-30 to 1e30":
        exponents = torch.linspace(-30, 30, d_in).double()[torch.randperm(d_in, generator=torch.Generator())]
        W = (W.sign() * 10.0**exponents).float()
    elif kind == "fp16 end":
        W = W.clamp(-1, 1) * torch.finfo(torch.float16).max
    return W


def inputs(kind: str, d_in: int = D_IN) -> Tensor:
    X = normal(TOKENS, d_in, seed=2) + normal(TOKENS, 1, seed=3)
    if kind == "outliers":
        X[:, ::17] *= 1e4
    elif kind == "constant":
        X = torch.full((TOKENS, d_in), 0.7)
    elif kind == "one token":
        X = X[:1]
    elif kind == "duplicates":
        X = X[:3].repeat(13, 1)
    elif kind == "mostly zero":
        X[1:-1] = 0
    elif kind == "dead channels":
        X[:, 5 : 5 + d_in // 2] = 0
    elif kind == "dead":
        X.zero_()
    elif kind == "denormal":
        X *= 1e-40
    elif kind == "1e-12":
        X *= 1e-12
    elif kind == "1e12":
        X *= 1e12
    return X


def relevance(kind: str, num_tokens: int) -> Tensor:
    if kind == "one-hot":
        s = torch.zeros(num_tokens)
        s[num_tokens // 2] = 3.0
        return s
    if kind == "1e-38 to 1":
        return torch.logspace(0, -38, num_tokens, dtype=torch.float64).float()
    return torch.full((num_tokens,), {"equal": 0.37, "1e-25": 1e-25}[kind])


WEIGHTS = (
    "normal",
    "outliers",
    "zero",
    "zero groups",
    "constant",
    "denormal",
    "tiny",
    "huge",
    "1e-30 to 1e30",
    "fp16 end",
)
INPUTS = (
    "normal",
    "outliers",
    "constant",
    "one token",
    "duplicates",
    "mostly zero",
    "dead channels",
    "dead",
    "denormal",
    "1e-12",
    "1e12",
)
RELEVANCES = ("equal", "one-hot", "1e-38 to 1", "1e-25")


# --- the chain ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Chain:
    """One layer from its inputs to what is read back from its checkpoint."""

    H: Tensor
    factor: Factor
    candidates: list[QuantizedWeight]
    costs: list[float]

    def bytes(self) -> list[bytes]:
        tensors = [self.H, self.factor.R, *(t for q in self.candidates for t in (q.codes, q.scales.view(torch.int16)))]
        return [t.numpy().tobytes() for t in tensors] + [repr(self.costs).encode()]


def run(W: Tensor, X: Tensor, s: Tensor, choices: list[Choice], grid: Grid = Grid.SIGNED) -> Chain:
    sums = empty_hessian(X.shape[1])
    for rows in (slice(0, 16), slice(16, None)):
        sums = accumulate(sums, X[rows], s[rows])
    H = normalized(sums, name=NAME)
    factor = factorize(H, name=NAME)
    candidates = gptq(W, factor, choices, grid=grid, name=NAME)
    costs = predicted_cost(W, candidates, H, torch.linspace(0, 1e-3, len(W), dtype=torch.float64))
    return Chain(H=H, factor=factor, candidates=candidates, costs=costs)


def check_codes(W: Tensor, q: QuantizedWeight, grid: Grid) -> None:
    low, high = code_range(q.choice.bits)
    assert q.codes.dtype == torch.int8
    assert low <= int(q.codes.min())
    assert int(q.codes.max()) <= high
    assert torch.isfinite(q.scales).all()
    assert (q.scales.abs() >= torch.finfo(torch.bfloat16).tiny).all()
    assert grid is Grid.SIGNED or (q.scales > 0).all()
    groups = W.view(len(W), q.scales.shape[1], -1)
    zero = (groups == 0).all(-1)
    assert (q.scales[zero] == 1).all()
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.isfinite(q.dequantize(dtype)).all()
    tensors = pack(q)
    bits = sum(8 * tensors[name].nbytes for name in ("weight_packed", "weight_scale"))
    assert bits == storage_bits(*W.shape, q.choice)
    back = unpack(tensors, q.choice)
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.scales, q.scales)


def cost_over_tokens(W: Tensor, Q: Tensor, X: Tensor, s: Tensor) -> tuple[float, float]:
    """The cost from the tokens themselves in float64, and the largest it could be for errors of this size."""
    c, s, dW = torch.linspace(0, 1e-3, len(W), dtype=torch.float64), s.double() / s.double().sum(), (W - Q).double()
    X = X.double()
    errors = (X @ dW.T).square().mul(s[:, None]).sum(0)
    bound = dW.abs().sum(1).square() * (X.square() * s[:, None]).sum(0).max()
    return 0.5 * float(errors @ c), 0.5 * float(bound @ c)


@pytest.mark.parametrize("kind_of_inputs", INPUTS)
@pytest.mark.parametrize("kind_of_weight", WEIGHTS)
def test_any_layer_on_any_inputs(kind_of_weight: str, kind_of_inputs: str) -> None:
    W, X = weight(kind_of_weight), inputs(kind_of_inputs)
    kind = RELEVANCES[(WEIGHTS.index(kind_of_weight) + INPUTS.index(kind_of_inputs)) % len(RELEVANCES)]
    grid = CODABLE[WEIGHTS.index(kind_of_weight) % 2]
    s = relevance(kind, len(X))
    found = run(W, X, s, choices_of(D_IN), grid)
    assert found.bytes() == run(W.clone(), X.clone(), s.clone(), choices_of(D_IN), grid).bytes()
    live = (X * (X * s[:, None])).sum(0) > 0  # in float32, as they are summed
    assert found.factor.num_dead == D_IN - int(live.sum())
    assert found.factor.num_damping_steps == 0
    assert math.isfinite(found.factor.damping)
    for q, cost in zip(found.candidates, found.costs, strict=True):
        check_codes(W, q, grid)
        Q = q.dequantize()
        assert (Q[(W == 0).all(1)] == 0).all()
        expected, bound = cost_over_tokens(W, Q, X * live, s)
        assert cost >= 0
        assert math.isclose(cost, expected, rel_tol=1e-4, abs_tol=1e-6 * bound)
    if kind_of_weight == "zero" or not live.any():
        assert found.costs == [0.0] * len(found.costs)
