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
from lrpq.quant.factor import Factor, factorize
from lrpq.quant.gptq import gptq, loss, predicted_cost
from lrpq.quant.grid import Grid, QuantizedWeight, code_range, power_of_two
from lrpq.quant.hessian import accumulate, empty_hessian, merge, normalized
from lrpq.quant.importance import search_importance
from lrpq.quant.packing import pack, storage_bits, unpack
from lrpq.quant.rtn import round_to_nearest
from lrpq.refine.products import SiteProducts, merge_products
from lrpq.refine.quantize import Refined, quantize_refined
from lrpq.refine.sweep import RefineSweep
from lrpq.relevance.attribute import ModuleStats
from lrpq.relevance.composite import Relevance
from lrpq.relevance.rules import Pass
from lrpq.relevance.sweep import ProfileSweep, Shard, merge_block_sums
from lrpq.relevance.weights import NO_RELEVANCE, has_relevance, token_weights
from lrpq.shards import root

BITS = (2, 3, 4, 5, 6, 8)
D_OUT, D_IN, TOKENS = 6, 128, 40
FEW = settings(max_examples=20, deadline=None, derandomize=True)
NAME = "model.layers.3.mlp.up_proj"
CODABLE = (Grid.SYMMETRIC, Grid.SIGNED)


def choices_of(d_in: int) -> list[Choice]:
    sizes = [size for size in (32, 64, 128, -1) if d_in % size == 0]
    return [Choice(bits=bits, group_size=size) for bits in BITS for size in sizes]


def one_size(turn: int) -> list[Choice]:
    """All bit widths at one group size, each size in turn: one sweep with all of them takes four times as long."""
    return choices_of(D_IN)[turn % 4 :: 4]


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
        exponents = torch.linspace(-30, 30, d_in).double()[
            torch.randperm(d_in, generator=torch.Generator().manual_seed(5))
        ]
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


WEIGHTS = ["normal", "outliers", "zero", "zero groups", "constant", "denormal", "tiny", "huge", "1e-30 to 1e30"]
WEIGHTS += ["fp16 end"]
INPUTS = ["normal", "outliers", "constant", "one token", "duplicates", "mostly zero", "dead channels", "dead"]
INPUTS += ["denormal", "1e-12", "1e12"]
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
    assert bits == storage_bits(W.shape[0], W.shape[1], q.choice)
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
    i, j = WEIGHTS.index(kind_of_weight), INPUTS.index(kind_of_inputs)
    s, grid, choices = relevance(RELEVANCES[(i + j) % 4], len(X)), CODABLE[i % 2], one_size(i // 2 + j)
    found = run(W, X, s, choices, grid)
    assert found.bytes() == run(W.clone(), X.clone(), s.clone(), choices, grid).bytes()
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


@pytest.mark.parametrize("grid", CODABLE)
@pytest.mark.parametrize(("d_out", "d_in"), [(1, 1), (5, 1), (1, 33), (3, 96), (2, 384)])
@pytest.mark.parametrize("kind", ["normal", "outliers", "constant", "zero", "denormal", "huge"])
def test_narrow_layers(kind: str, d_out: int, d_in: int, grid: Grid) -> None:
    W, X, s = weight(kind, d_out, d_in), inputs("normal", d_in), relevance("equal", TOKENS)
    found = run(W, X, s, choices_of(d_in), grid)
    assert found.bytes() == run(W, X, s, choices_of(d_in), grid).bytes()
    for q, cost in zip(found.candidates, found.costs, strict=True):
        check_codes(W, q, grid)
        assert 0 <= cost < math.inf
    if d_in == 96:
        two_bits = next(q for q in found.candidates if q.choice == Choice(bits=2, group_size=32))
        assert two_bits.scales.shape == (d_out, 3)
        assert pack(two_bits)["weight_packed"].shape == (d_out, 96 * 2 // 32)


@pytest.mark.parametrize("x", [1e-12, 0.3, -7.0, 1e12])
def test_one_input_and_one_token_in_closed_form(x: float) -> None:
    """H = x^2 whatever the token weighs, the code rounds w / scale, and the cost is c x^2 (w - q)^2 / 2."""
    W, X = normal(50, 1, seed=4).exp() * normal(50, 1, seed=5).sign(), torch.tensor([[x]])
    found = run(W, X, torch.tensor([0.37]), choices_of(1))
    assert float(found.H) == pytest.approx(x * x, rel=1e-6)
    assert found.factor.damping == pytest.approx(0.01 * x * x, rel=1e-6)
    assert float(found.factor.diagonal) == pytest.approx(math.sqrt(1.01) * abs(x), rel=1e-6)
    c = torch.linspace(0, 1e-3, 50, dtype=torch.float64)
    for q, cost in zip(found.candidates, found.costs, strict=True):
        low, high = code_range(q.choice.bits)
        assert torch.equal(q.codes, (W / q.scales.float()).round().clamp(low, high).to(torch.int8))
        dW = (W - q.dequantize()).double()
        # a scale of its own for every weight: what is left is half a unit of bfloat16, or of a code at 8 bits
        assert (dW.abs() <= W.abs() / 128).all()
        assert cost == pytest.approx(0.5 * float(c @ dW.squeeze(1).square()) * x * x, rel=1e-5)


# --- what a factor in weights, inputs or relevance does -------------------------------------------


def scaled(of_weight: float, of_inputs: float, of_relevance: float, grid: Grid) -> Chain:
    W, X = weight("outliers")[:, :64], inputs("dead channels", 64) * torch.linspace(0.01, 100, 64)
    choices = [Choice(bits=bits, group_size=32) for bits in BITS]
    return run(W * of_weight, X * of_inputs, torch.logspace(-6, 0, TOKENS) * of_relevance, choices, grid)


@pytest.mark.parametrize("grid", CODABLE)
def test_powers_of_two_scale_the_scales_and_costs_and_leave_the_codes(grid: Grid) -> None:
    plain = scaled(1, 1, 1, grid)

    @FEW
    @given(of_weight=st.integers(-110, 80), of_inputs=st.integers(-20, 20), of_relevance=st.integers(-40, 40))
    def check(of_weight: int, of_inputs: int, of_relevance: int) -> None:
        found = scaled(2.0**of_weight, 2.0**of_inputs, 2.0**of_relevance, grid)
        assert torch.equal(found.H.double(), plain.H.double() * 4.0**of_inputs)
        assert found.factor.num_dead == plain.factor.num_dead == 32
        for a, b in zip(plain.candidates, found.candidates, strict=True):
            assert torch.equal(a.codes, b.codes)
            assert torch.equal(a.scales.double() * 2.0**of_weight, b.scales.double())
        assert found.costs == [cost * 4.0 ** (of_weight + of_inputs) for cost in plain.costs]

    check()


@FEW
@given(seed=st.integers(0, 10**6), share=st.floats(0.0, 1.0), token=st.integers(0, 11))
def test_copies_of_a_token_share_its_weight_in_any_order(seed: int, share: float, token: int) -> None:
    X, s = inputs("outliers", 32)[:12], normal(12, seed=seed).exp()
    H = normalized(accumulate(empty_hessian(32), X, s))
    copied, shared = torch.cat([X, X[token : token + 1]]), torch.cat([s, s[token : token + 1] * (1 - share)])
    shared[token] = s[token] * share
    order = torch.randperm(13, generator=torch.Generator().manual_seed(seed))
    again = normalized(accumulate(empty_hessian(32), copied[order], shared[order]))
    parts = [accumulate(empty_hessian(32), copied[rows], shared[rows]) for rows in (order[:5], order[5:])]
    scale = H.diagonal().sqrt()
    for other in (again, normalized(merge(*parts))):
        assert ((other - H).abs() <= 1e-6 * scale[:, None] * scale).all()


@FEW
@given(values=st.lists(st.floats(0.0, 2.0**127, width=32), min_size=1, max_size=20))
def test_dividing_by_a_power_of_two_keeps_the_digits(values: list[float]) -> None:
    x = torch.tensor([*values, 0.0, 1e-45, 3e-40, torch.finfo(torch.float32).max])
    unit = power_of_two(x)
    assert (torch.frexp(unit).mantissa == 0.5).all()
    live = x > 0
    assert ((x / unit >= 1) & (x / unit < 2))[live].all()
    assert (unit[~live] == 1).all()
    assert torch.equal(x / unit * unit, x)


# --- how good the codes are -----------------------------------------------------------------------


def damped(found: Chain) -> Tensor:
    live = found.H.diagonal() > 0
    return found.H.double() + torch.diag(torch.where(live, 0.0, 1.0) + found.factor.damping).double()


def form(dW: Tensor, H: Tensor) -> Tensor:
    return torch.einsum("oi,ij,oj->o", dW.double(), H, dW.double())


@pytest.mark.parametrize("kind", ["normal", "outliers", "constant", "one token", "mostly zero", "dead channels"])
def test_errors_stay_within_the_bound_of_the_nearest_plane(kind: str) -> None:
    """dW (H + damping) dW^T <= sum_k R_kk^2 scale^2 / 4 for every row of which no code reaches the end of its range.

    That is Babai's bound. That GPTQ beats round-to-nearest on every row is no theorem, in the damped norm or without:
    some rows are the other way round. But round-to-nearest has no such bound, and inputs of low rank take it beyond.
    """
    W, X = normal(200, D_IN, seed=8), inputs(kind)
    eight = [Choice(bits=8, group_size=-1)]
    found = run(W, X, torch.ones(len(X)), eight)
    scales = (W.abs().amax(1, keepdim=True) / 16).bfloat16()
    (q,) = gptq(W, found.factor, eight, scales=[scales])
    assert int(q.codes.int().abs().max()) < 127
    H = damped(found)
    bound = found.factor.diagonal.double().square().sum() * scales.double().squeeze(1).square() / 4
    assert (form(W - q.dequantize(), H) <= bound * (1 + 1e-4)).all()
    nearest = (W / scales.float()).round() * scales.float()
    if kind in ("constant", "one token"):
        assert (form(W - nearest, H) > bound).any()
    if kind == "outliers":
        assert (form(W - nearest, H) < form(W - q.dequantize(), H)).any()
    assert form(W - q.dequantize(), H).sum() < form(W - nearest, H).sum()


@pytest.mark.parametrize("kind_of_weight", ["normal", "outliers", "constant", "fp16 end"])
@pytest.mark.parametrize("kind_of_inputs", ["normal", "outliers", "constant", "one token", "1e-12"])
def test_no_other_code_of_the_last_column_is_better(kind_of_weight: str, kind_of_inputs: str) -> None:
    """The last column sees all errors, so its code is the best one within its range, in the damped norm."""
    W, X = weight(kind_of_weight), inputs(kind_of_inputs)
    found = run(W, X, torch.ones(len(X)), one_size(len(kind_of_weight)))
    H, last = damped(found), int(found.factor.order[-1])
    for q in found.candidates:
        reached = form(W - q.dequantize(), H)
        for step in (-1, 1):
            low, high = code_range(q.choice.bits)
            codes = q.codes.clone()
            codes[:, last] = (codes[:, last].int() + step).clamp(low, high).to(torch.int8)
            other = form(W - QuantizedWeight(codes=codes, scales=q.scales, choice=q.choice).dequantize(), H)
            assert (other >= reached * (1 - 1e-5)).all()


@pytest.mark.parametrize("grid", CODABLE)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_inputs_that_never_fire_together_give_round_to_nearest(kind: str, grid: Grid) -> None:
    W, X = weight(kind), torch.logspace(-4, 4, D_IN).diag()
    found = run(W, X, torch.ones(D_IN), choices_of(D_IN), grid)
    importance = search_importance(factorize(found.H))
    for q in found.candidates:
        nearest = round_to_nearest(W, q.choice, importance=importance, grid=grid)
        assert torch.equal(q.codes, nearest.codes)
        assert torch.equal(q.scales, nearest.scales)


def test_a_loss_of_next_to_nothing_is_not_negative() -> None:
    """H has rank one and GPTQ leaves almost none of it: float32 rounds the form to either side of zero."""
    below, H = 0, normalized(accumulate(empty_hessian(96), inputs("one token", 96), torch.ones(1)))
    for seed in range(40):
        W = normal(4, 96, seed=seed)
        for q in gptq(W, factorize(H), [Choice(bits=bits, group_size=-1) for bits in BITS]):
            dW = W - q.dequantize()
            below += int(((dW @ H * dW).sum(1) < 0).sum())
            assert (loss(W, q.dequantize(), H) >= 0).all()
    assert below > 0


# --- the ends of the formats ----------------------------------------------------------------------


def test_what_float32_cannot_sum_is_refused_by_name() -> None:
    W, X, one = weight("normal"), inputs("normal"), torch.ones(TOKENS)
    sums = {
        "weights of 1e-38": (X, one * 1e-38),
        "weights that vanish in float32": (X, one.double() * 1e-300),
        "weights of 1e38": (X, one * 1e38),
        "inputs of 1e-18": (X * 1e-18, one),
        "inputs of 1e18": (X * 1e18, one),
        "squares beyond float32": (X * 1e30, one),
        "an infinite input": (X.index_fill(1, torch.tensor([3]), math.inf), one),
        "an input that is no number, without weight": (X.index_fill(0, torch.tensor([0]), math.nan), one.clone()),
    }
    sums["an input that is no number, without weight"][1][0] = 0
    for case, (x, s) in sums.items():
        with pytest.raises(QuantizationError, match=f"{NAME}: .*40 calibration tokens") as error:
            run(W, x, s, choices_of(D_IN))
        assert "\n" not in str(error.value), case


def test_weights_that_the_column_loop_could_overflow_are_refused_by_name() -> None:
    X, choices = inputs("constant"), choices_of(D_IN)
    run(weight("normal") * 1e33, X, torch.ones(TOKENS), choices)
    for magnitude in (1e36, 1e38):
        W = weight("normal").clamp(-3, 3) * magnitude
        with pytest.raises(QuantizationError, match=f"{NAME}: weights up to .* may overflow torch.float32"):
            run(W, X, torch.ones(TOKENS), choices)
    with pytest.raises(QuantizationError, match=f"{NAME}: its weight is not finite"):
        run(weight("normal").index_fill(1, torch.tensor([9]), math.nan), X, torch.ones(TOKENS), choices)
    factor, eight = factorize(normalized(accumulate(empty_hessian(D_IN), X, torch.ones(TOKENS)))), choices[-1:]
    endless = "its grid of scales is not finite"
    for bad, complaint in ((0.0, "a scale is zero"), (math.inf, endless), (math.nan, endless)):
        scales = torch.ones(D_OUT, 1).index_fill(0, torch.tensor([2]), bad)
        with pytest.raises(QuantizationError, match=f"{NAME}: .*{complaint}"):
            gptq(weight("normal"), factor, eight, scales=[scales], name=NAME)


@pytest.mark.parametrize("grid", CODABLE)
def test_whatever_bfloat16_holds_stays_finite_in_it(grid: Grid) -> None:
    W = normal(20, 64).sign() * torch.finfo(torch.bfloat16).max * normal(20, 64, seed=6).clamp(-1, 1).abs()
    W[0] = torch.finfo(torch.bfloat16).max
    W[1] = -W[0]
    for bits in BITS:
        for importance in (None, torch.ones(64)):
            q = round_to_nearest(W, Choice(bits=bits, group_size=32), importance=importance, grid=grid)
            check_codes(W, q, grid)


@pytest.mark.parametrize("grid", CODABLE)
def test_float16_holds_the_values_or_says_that_it_does_not(grid: Grid) -> None:
    """Up to an eighth of float16's range all is finite and close; at its end the grid reaches beyond, and says so."""
    X, choices = inputs("normal"), choices_of(D_IN)
    for magnitude in (1e-6, 1e-3, 1.0, 65504 / 8):
        W = normal(D_OUT, D_IN, seed=9).clamp(-1, 1) * magnitude
        for q in run(W, X, torch.ones(TOKENS), choices, grid).candidates:
            exact, half = q.dequantize(), q.dequantize(torch.float16).float()
            # two roundings, and scales below 2^-17, which float16 keeps to a multiple of 2^-24
            allowed = exact.abs() * 2.0**-10 + q.codes.float().abs() * 2.0**-25
            assert ((half - exact).abs() <= allowed).all()
    beyond = 0
    for q in run(weight("fp16 end"), X, torch.ones(TOKENS), choices, grid).candidates:
        if bool((q.dequantize().abs() > 65504).any()):
            beyond += 1
            with pytest.raises(QuantizationError, match=f"{NAME}: scale times code is beyond float16's largest"):
                q.dequantize(torch.float16, name=NAME)
        else:
            assert torch.isfinite(q.dequantize(torch.float16)).all()
        assert torch.isfinite(q.dequantize(torch.bfloat16)).all()
    assert beyond > 0


# --- refinement -----------------------------------------------------------------------------------


def products(X: Tensor, Xq: Tensor, s: Tensor) -> SiteProducts:
    shift = ((X - Xq) * s[:, None]).T @ Xq
    return SiteProducts(hessian=accumulate(empty_hessian(X.shape[1]), Xq, s), shift=shift)


def row_errors(W: Tensor, Q: Tensor, X: Tensor, Xq: Tensor, s: Tensor) -> Tensor:
    difference = X.double() @ W.double().T - Xq.double() @ Q.double().T
    return (difference.square() * s.double()[:, None]).sum(0) / s.double().sum()


def same(a: Refined, b: Refined) -> bool:
    counts = [(r.rejected_rows, r.rows, r.damping_steps, r.dead_inputs) for r in (a, b)]
    codes = torch.equal(a.weight.codes, b.weight.codes) and torch.equal(a.weight.scales, b.weight.scales)
    return codes and counts[0] == counts[1]


@pytest.mark.parametrize("kind_of_inputs", INPUTS)
@pytest.mark.parametrize("kind_of_weight", WEIGHTS)
def test_refining_any_layer_on_any_inputs(kind_of_weight: str, kind_of_inputs: str) -> None:
    W, X, choice = weight(kind_of_weight, 40), inputs(kind_of_inputs), Choice(bits=3, group_size=32)
    Xq = X * (1 + 0.2 * normal(*X.shape, seed=11))
    s = relevance(("equal", "one-hot", "1e-38 to 1")[INPUTS.index(kind_of_inputs) % 3], len(X))
    site = products(X, Xq, s)
    how: dict[str, Any] = {"grid": Grid.SIGNED, "name": NAME, "polish_rounds": 0}
    plain = quantize_refined(W, site, choice, strength=0.0, **how)
    refined = quantize_refined(W, site, choice, strength=0.5, **how)
    assert same(refined, quantize_refined(W.clone(), products(X, Xq, s), choice, strength=0.5, **how))
    check_codes(torch.ones_like(W), refined.weight, Grid.SIGNED)  # a correction may fill a group of zeros
    live = (Xq * (Xq * s[:, None])).sum(0) > 0
    assert refined.dead_inputs == plain.dead_inputs == D_IN - int(live.sum())
    assert refined.damping_steps == 0
    assert (refined.rows, plain.rejected_rows) == (40, 0)
    assert (refined.weight.dequantize()[(W == 0).all(1)] == 0).all()
    kept = (refined.weight.codes == plain.weight.codes).all(1) & (refined.weight.scales == plain.weight.scales).all(1)
    assert refined.rejected_rows <= int(kept.sum())
    errors = [row_errors(W, r.weight.dequantize(), X * live, Xq * live, s) for r in (refined, plain)]
    outputs = row_errors(W.abs(), -W.abs(), X.abs(), Xq.abs(), s)  # what float32 rounds against
    assert torch.isfinite(errors[0]).all()
    assert (errors[0] <= errors[1] * (1 + 1e-5) + 1e-5 * outputs).all()
    how["polish_rounds"] = 2
    polished = quantize_refined(W, site, choice, strength=0.5, **how)
    assert same(polished, quantize_refined(W.clone(), products(X, Xq, s), choice, strength=0.5, **how))
    check_codes(torch.ones_like(W), polished.weight, Grid.SIGNED)
    errors.append(row_errors(W, polished.weight.dequantize(), X * live, Xq * live, s))
    assert (errors[2] <= errors[0] * (1 + 1e-5) + 1e-5 * outputs).all()
    if (kind_of_weight, kind_of_inputs) == ("normal", "normal"):
        assert errors[0].sum() < 0.9 * errors[1].sum()


@pytest.mark.parametrize("power", [-100, -64, 64, 80])
def test_powers_of_two_leave_the_refined_codes_and_the_rejected_rows(power: int) -> None:
    X, choice = inputs("outliers"), Choice(bits=3, group_size=32)
    site = products(X, X * (1 + 0.2 * normal(*X.shape, seed=11)), torch.linspace(0.1, 1, TOKENS))
    plain, found = (
        quantize_refined(weight("normal", 100) * factor, site, choice, strength=0.5, name=NAME)
        for factor in (1.0, 2.0**power)
    )
    assert 0 < plain.rejected_rows < 100
    assert found.rejected_rows == plain.rejected_rows
    assert torch.equal(found.weight.codes, plain.weight.codes)
    assert torch.equal(found.weight.scales.double(), plain.weight.scales.double() * 2.0**power)


def test_every_raised_damping_is_counted_also_that_of_the_correction() -> None:
    W, X, choice = weight("normal"), inputs("constant"), Choice(bits=4, group_size=-1)
    site = products(X, 0.9 * X, torch.ones(TOKENS))
    steps = [
        quantize_refined(W, site, choice, strength=1.0, damping=a, correction_damping=b, name=NAME).damping_steps
        for a, b in ((0.01, 0.1), (0.01, 1e-12), (1e-12, 0.1), (1e-12, 1e-12))
    ]
    assert steps[0] == 0
    assert min(steps[1], steps[2]) > 0
    assert steps[3] == steps[1] + steps[2]


# --- token weights --------------------------------------------------------------------------------


def site_of(fisher: Tensor, lrp: Tensor | None = None, d_out: int = 4096) -> list[ModuleStats]:
    sums = {Pass.FISHER: fisher, Pass.LRP: fisher if lrp is None else lrp, Pass.CP_LRP: fisher}
    return [ModuleStats(d_out=d_out, token_sums=sums, channel_sums=torch.ones(d_out, dtype=torch.float64))] * 3


WEIGHTED = (Relevance.FISHER, Relevance.LRP, Relevance.CP_LRP, Relevance.BLEND)


@pytest.mark.parametrize("kind_of_relevance", WEIGHTED, ids=lambda kind: kind.value)
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_token_weights_of_difficult_gradients(kind_of_relevance: Relevance, power: float) -> None:
    for magnitude in (1e-38, 1e-30, 1.0, 1e30, 3e38):
        ones = torch.full((64,), magnitude)
        equal = token_weights(site_of(ones), kind_of_relevance, site="0.qkv", power=power)
        assert equal.dtype == torch.float32
        assert (equal == equal[0]).all()
        expected = (1.03 * magnitude / 4096) ** power
        assert float(equal[0]) == pytest.approx(expected, rel=1e-3, abs=1e-44)
        one_hot = torch.zeros(64)
        one_hot[5] = magnitude
        s = token_weights(site_of(one_hot), kind_of_relevance, site="0.qkv", power=power).double()
        assert int(s.argmax()) == 5
        others = torch.cat([s[:5], s[6:]])
        assert (others == others[0]).all()
        assert float(others[0] / s[5]) == pytest.approx((0.03 / 64 / (1 + 0.03 / 64)) ** power, rel=1e-3, abs=1e-3)


def test_a_blend_of_very_different_passes_has_the_fishers_mean() -> None:
    pattern = torch.linspace(1.0, 2.0, 64)
    for fisher, lrp in ((1e-36, 1e36), (1e36, 1e-36), (1e36, 1e36)):
        modules = site_of(pattern * fisher, pattern * lrp, d_out=2)
        s = token_weights(modules, Relevance.BLEND, site="0.o", floor=0.0).double()
        torch.testing.assert_close(s, pattern.double() * fisher / 2, rtol=1e-5, atol=0)


def test_without_relevance_all_tokens_weigh_alike_and_nothing_beside_others() -> None:
    first, second = torch.eye(8)[0], torch.eye(8)[1]
    for modules in (site_of(first, second), site_of(0 * first)):
        s = token_weights(modules, Relevance.BLEND, site="3.gate_up")
        assert torch.equal(s, torch.full_like(s, NO_RELEVANCE))
        assert not has_relevance(float(s.sum()), len(s))
    faint = token_weights(site_of(first * 1e-30), Relevance.FISHER, site="3.gate_up", power=0.5)
    assert has_relevance(float(faint.sum()), len(faint))
    with pytest.raises(QuantizationError, match=r"site 3\.gate_up: the fisher weights of its tokens are not finite"):
        token_weights(site_of(first / 0), Relevance.FISHER, site="3.gate_up")


# --- a model --------------------------------------------------------------------------------------

LAYERS, VOCABULARY = 3, 128
WINDOWS = torch.randint(VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(3))


def difficult_values(model: Any) -> None:
    first, second, third = model.model.layers
    first.input_layernorm.weight[7] = 1e4
    first.post_attention_layernorm.weight[3] = 0  # a dead input
    second.self_attn.v_proj.weight.zero_()  # and with it all inputs of o
    second.mlp.up_proj.weight.zero_()  # and those of down
    third.mlp.gate_proj.weight[::2] = 1e-40
    third.self_attn.k_proj.weight.mul_(1e-30)
    third.self_attn.q_proj.weight[:, 5] *= 1e4
    model.model.embed_tokens.weight[5:100] = 0  # most tokens


def zero_output(model: Any) -> None:
    model.model.layers[1].self_attn.o_proj.weight.zero_()


def huge_values(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight.mul_(1e30)


def model_with(edit: Callable[[Any], None], folder: Path) -> Path:
    write_llama(folder, layers=LAYERS)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        edit(model)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def difficult(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_with(difficult_values, tmp_path_factory.mktemp("stress") / "llama")


def profiled(folder: Path, tokens: Tensor, kind: Relevance) -> dict[str, tuple[Tensor, Chain]]:
    """Every module through profile and candidates: its curvature and the chain."""
    stream = BlockStream(ModelSource(folder), dtype=torch.float32)
    sweep = ProfileSweep(
        stream,
        [Shard(index=0, first_window=0, tokens=tokens)],
        num_shards=1,
        relevance=kind,
        floor=0.03,
        power=0.5,
        seed=0,
        micro_batch=2,
        kept=KeptInputs(memory_bytes=1 << 30),
    )
    sweep.embed()
    for index, block in stream.stream(range(LAYERS)):
        sweep.forward(index, block)
    nats, _ = sweep.seed_gradients()
    assert math.isfinite(nats)
    found = {}
    for index, block in stream.stream(range(LAYERS - 1, -1, -1)):
        sums = root(sweep.backward(index, block)[0], 1, merge_block_sums)
        for site, specs in stream.sites(index).items():
            H = normalized(sums.hessians[site], name=specs[0].fused_group)
            factor = factorize(H, name=specs[0].fused_group)
            for spec in specs:
                W = block.get_parameter(f"{stream.local_name(spec)}.weight").detach()
                choices = [Choice(bits=bits, group_size=32) for bits in BITS]
                candidates = gptq(W, factor, choices, grid=Grid.SIGNED, name=spec.name)
                for q in candidates:
                    check_codes(W, q, Grid.SIGNED)
                costs = predicted_cost(W, candidates, H, sums.curvature[spec.name] / sums.num_tokens)
                chain = Chain(H=H, factor=factor, candidates=candidates, costs=costs)
                found[spec.name] = (sums.curvature[spec.name], chain)
    sweep.kept.close()
    return found


@pytest.mark.parametrize("kind", [Relevance.BLEND, Relevance.NONE], ids=lambda kind: kind.value)
def test_a_model_of_difficult_values_is_profiled(difficult: Path, kind: Relevance) -> None:
    found, again = profiled(difficult, WINDOWS, kind), profiled(difficult, WINDOWS, kind)
    assert len(found) == 7 * LAYERS
    for name, (curvature, chain) in found.items():
        assert torch.isfinite(curvature).all()
        assert all(0 <= cost < math.inf for cost in chain.costs)
        assert chain.factor.num_damping_steps == 0
        assert chain.bytes() == again[name][1].bytes()
    dead = {name.removeprefix("model.layers."): chain.factor.num_dead for name, (_, chain) in found.items()}
    expected = {"0.mlp.gate_proj": 1, "0.mlp.up_proj": 1, "1.self_attn.o_proj": 64, "1.mlp.down_proj": 128}
    # a gate of 1e-40 leaves inputs of down whose squares are zero
    assert {name: n for name, n in dead.items() if n} == expected | {"2.mlp.down_proj": 64}
    for name in ("1.self_attn.v_proj", "1.self_attn.o_proj", "1.mlp.up_proj", "1.mlp.down_proj"):
        assert not any(found[f"model.layers.{name}"][1].costs)
    assert sum(any(chain.costs) for _, chain in found.values()) >= 13


def test_one_calibration_token_is_enough_to_stay_finite(difficult: Path) -> None:
    for _, chain in profiled(difficult, WINDOWS[:1, :1], Relevance.FISHER).values():
        assert all(0 <= cost < math.inf for cost in chain.costs)


def test_behind_a_layer_of_zeros_hessians_are_unweighted_and_costs_zero(tmp_path: Path) -> None:
    folder = model_with(zero_output, tmp_path / "llama")
    found, plain = (profiled(folder, WINDOWS, kind) for kind in (Relevance.FISHER, Relevance.NONE))
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        curvature, chain = found[f"model.layers.1.self_attn.{name}"]
        assert chain.costs == [0.0] * len(chain.costs)
        assert bool(curvature.any()) == (name == "o_proj")
        if name != "o_proj":
            torch.testing.assert_close(chain.H, plain[f"model.layers.1.self_attn.{name}"][1].H, rtol=1e-5, atol=1e-6)


def refined_model(folder: Path, tokens: Tensor) -> tuple[dict[str, Refined], Tensor]:
    """Every module behind the quantized prefix, and what comes out of the last block."""
    stream = BlockStream(ModelSource(folder), dtype=torch.float32)
    sweep = RefineSweep(stream, {0: tokens}, num_shards=1, micro_batch=2, with_shift=True)
    sweep.embed()
    found: dict[str, Refined] = {}
    for index, block in stream.stream(range(LAYERS)):
        done: dict[str, Tensor] = {}
        for specs in stream.sites(index).values():
            site = root(sweep.products(index, block, specs, None, done), 1, merge_products)
            for spec in specs:
                W = block.get_parameter(f"{stream.local_name(spec)}.weight").detach()
                choice = Choice(bits=3, group_size=32)
                found[spec.name] = quantize_refined(W, site, choice, strength=0.5, name=spec.name)
                done[spec.name] = found[spec.name].weight.dequantize()
        sweep.advance(index, block, done)
    return found, torch.cat(sweep.quantized[0])


@pytest.mark.parametrize("tokens", [WINDOWS, WINDOWS[:1, :1]], ids=["36 tokens", "one token"])
def test_a_model_of_difficult_values_is_refined(difficult: Path, tokens: Tensor) -> None:
    (found, outputs), (again, outputs_again) = refined_model(difficult, tokens), refined_model(difficult, tokens)
    assert torch.isfinite(outputs).all()
    assert torch.equal(outputs, outputs_again)
    for name, refined in found.items():
        assert same(refined, again[name])
        assert refined.damping_steps == 0
        assert 0 <= refined.rejected_rows <= refined.rows
    for name, dead in (("self_attn.o_proj", 64), ("mlp.down_proj", 128)):
        assert found[f"model.layers.1.{name}"].dead_inputs == dead
    for name in ("self_attn.v_proj", "mlp.up_proj"):
        assert not found[f"model.layers.1.{name}"].weight.codes.any()


def test_a_model_that_overflows_ends_in_the_name_of_the_layer(tmp_path: Path) -> None:
    folder = model_with(huge_values, tmp_path / "llama")
    with pytest.raises(QuantizationError, match=r"model\.layers\.0\.mlp\.down_proj: sums over its 36 calibration"):
        refined_model(folder, WINDOWS)
    with pytest.raises(QuantizationError, match=r"model\.layers\.0\.down: sums over its 36 calibration"):
        profiled(folder, WINDOWS, Relevance.FISHER)
