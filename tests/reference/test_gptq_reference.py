"""GPTQ, the correction and the Hessian sums against plain float64 implementations written differently."""

from dataclasses import fields

import numpy as np
import pytest
import torch

from lrpq.model.layers import Choice
from lrpq.quant.correction import correct, target_error
from lrpq.quant.factor import factorize
from lrpq.quant.gptq import gptq, loss, predicted_cost
from lrpq.quant.grid import Grid, code_range
from lrpq.quant.hessian import (
    HessianSum,
    accumulate,
    add,
    damped_cholesky,
    empty_hessian,
    merge,
    mirror,
    normalized,
)
from lrpq.quant.importance import search_importance
from lrpq.quant.rtn import round_to_nearest
from lrpq.quant.scale_search import search_scales
from lrpq.shards import root


def correlated_inputs(num_tokens: int, d_in: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(d_in) + torch.randn(d_in, d_in, generator=generator) / d_in**0.5
    common = torch.randn(num_tokens, 1, generator=generator)
    X: torch.Tensor = torch.randn(num_tokens, d_in, generator=generator) @ mixing + common
    return X.double()


def hessian_of(X: torch.Tensor) -> torch.Tensor:
    return X.T @ X / len(X)


def weights(d_out: int, d_in: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(seed)).double()


def optimal_brain_quantizer(
    W: np.ndarray, H: np.ndarray, scales: np.ndarray, bits: int, *, damping: float, act_order: bool
) -> np.ndarray:
    """Row by row, weight by weight, with the inverse Hessian of the weights not yet rounded.

    Rounding weight k changes the others by -(w_k - q_k) / Hinv_kk times row k of Hinv, after which row and
    column k are eliminated from Hinv (Frantar & Alistarh 2022, equations 3 and 4, in GPTQ's fixed order).
    """
    low, high = code_range(bits)
    d_out, d_in = W.shape
    width = d_in // scales.shape[1]
    order = np.argsort(-np.diag(H), kind="stable") if act_order else np.arange(d_in)
    damped = H + damping * np.mean(np.diag(H)) * np.eye(d_in)
    codes = np.zeros((d_out, d_in), dtype=np.int64)
    for row in range(d_out):
        w = W[row].copy()
        inverse = np.linalg.inv(damped)
        for k in order:
            scale = scales[row, k // width]
            codes[row, k] = int(np.clip(np.rint(w[k] / scale), low, high))
            error = w[k] - codes[row, k] * scale
            w -= error / inverse[k, k] * inverse[k]
            inverse -= np.outer(inverse[:, k], inverse[k]) / inverse[k, k]
            inverse[k, k] = 1.0  # eliminated: never read again, but not to be divided by
    return codes


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("group_size", [16, -1])
def test_codes_equal_optimal_brain_quantization(act_order: bool, group_size: int) -> None:
    W, H = weights(7, 48), hessian_of(correlated_inputs(200, 48))
    choices = [Choice(bits=bits, group_size=group_size) for bits in (2, 3, 4, 8)]
    quantized = gptq(W, factorize(H, act_order=act_order), choices)
    for q in quantized:
        expected = optimal_brain_quantizer(
            W.numpy(),
            H.numpy(),
            q.scales.double().numpy(),
            q.choice.bits,
            damping=0.01,
            act_order=act_order,
        )
        assert np.array_equal(q.codes.numpy(), expected)


def test_asymmetric_codes_equal_the_shifted_reference() -> None:
    """With a one-sided range, every code is its symmetric-like code minus the zero point."""
    W, H = weights(4, 32).abs(), hessian_of(correlated_inputs(100, 32))
    (q,) = gptq(W, factorize(H), [Choice(bits=4, group_size=-1)], grid=Grid.ASYMMETRIC)
    assert q.zero_points is not None
    assert (q.zero_points == -8).all()  # nothing lies below zero: levels are 0 .. 15 steps
    order = np.argsort(-np.diag(H.numpy()), kind="stable")
    damped = H.numpy() + 0.01 * np.mean(np.diag(H.numpy())) * np.eye(32)
    for row in range(4):
        w, inverse, scale = W[row].numpy().copy(), np.linalg.inv(damped), float(q.scales[row])
        for k in order:
            level = np.clip(np.rint(w[k] / scale), 0, 15)
            assert level == int(q.codes[row, k]) + 8
            w -= (w[k] - level * scale) / inverse[k, k] * inverse[k]
            inverse -= np.outer(inverse[:, k], inverse[k]) / inverse[k, k]
            inverse[k, k] = 1.0


def test_gptq_is_far_better_than_rounding_on_correlated_inputs() -> None:
    """Fails if GPTQ is swapped for round-to-nearest with the same scales, or propagates errors wrongly."""
    W, H = weights(32, 128), hessian_of(correlated_inputs(512, 128))
    choices = [Choice(bits=bits, group_size=32) for bits in (2, 3, 4, 6)]
    curvature = torch.rand(32, generator=torch.Generator().manual_seed(1)).double()
    plain = [round_to_nearest(W, choice, importance=H.diagonal()) for choice in choices]
    for ours, theirs in zip(
        predicted_cost(W, gptq(W, factorize(H), choices), H, curvature),
        predicted_cost(W, plain, H, curvature),
        strict=True,
    ):
        assert ours < 0.6 * theirs


def test_loss_and_cost_are_the_undamped_quadratic_form() -> None:
    for d_in in (1, 5, 48, 131):
        W, H = weights(9, d_in), hessian_of(correlated_inputs(60, d_in))
        (q,) = gptq(W, factorize(H), [Choice(bits=2, group_size=-1)])
        dW = W - q.dequantize(torch.float64)
        expected = torch.einsum("oi,ij,oj->o", dW, H, dW)
        assert torch.allclose(loss(W, q.dequantize(torch.float64), H), expected, rtol=1e-12)
        curvature = torch.rand(9, generator=torch.Generator().manual_seed(2)).double()
        (cost,) = predicted_cost(W, [q], H, curvature)
        assert cost == pytest.approx(0.5 * float(expected @ curvature), rel=1e-12)
        (single,) = predicted_cost(W.float(), [q], H.float(), curvature.float())
        assert single == pytest.approx(cost, rel=1e-5)


def test_token_weights_change_the_codes_as_repeated_tokens_would() -> None:
    """Fails if weights are replaced by ones: weight 3 is the token three times, weight 0 is its absence."""
    X = correlated_inputs(90, 32).float()
    s = torch.randint(0, 4, (90,), generator=torch.Generator().manual_seed(3)).float()
    weighted = normalized(accumulate(empty_hessian(32), X, s))
    repeated = X.double().repeat_interleave(s.long(), dim=0)
    assert torch.allclose(weighted.double(), hessian_of(repeated), rtol=1e-4, atol=1e-5)

    W, choices = weights(16, 32).float(), [Choice(bits=3, group_size=32)]
    unweighted = normalized(accumulate(empty_hessian(32), X, torch.ones(90)))
    codes = [gptq(W, factorize(H), choices)[0].codes for H in (weighted, unweighted)]
    assert (codes[0] != codes[1]).float().mean() > 0.05


@pytest.mark.parametrize("d_in", [1, 3, 8, 37, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accumulated_sums(d_in: int, dtype: torch.dtype) -> None:
    X = correlated_inputs(50, d_in).to(dtype).view(5, 10, d_in)
    s = torch.rand(5, 10, generator=torch.Generator().manual_seed(4))
    sums = empty_hessian(d_in)
    for x, weight in zip(X, s, strict=True):
        grown = accumulate(sums, x, weight)
        assert grown.xx is sums.xx  # in place
        sums = grown
    x64, s64 = X.double().view(-1, d_in), s.double().view(-1)
    expected = (x64.T * s64) @ x64
    assert torch.allclose(sums.xx.double().triu(), expected.triu(), rtol=1e-5, atol=1e-5)
    assert sums.num_tokens == 50
    assert sums.weight_sum == pytest.approx(float(s64.sum()))
    H = normalized(sums)
    assert torch.equal(H, H.T)
    assert torch.allclose(H.double(), expected / s64.sum(), rtol=1e-5, atol=1e-6)
    before = sums.xx.clone()
    assert torch.equal(normalized(mirror(sums)), H)
    assert torch.equal(sums.xx.triu(), before.triu())


def merge_tree(parts: list[HessianSum]) -> HessianSum:
    return root({(0, i): part for i, part in enumerate(parts)}, len(parts), merge)


def test_merging_in_the_fixed_tree_gives_the_same_bytes() -> None:
    def part(i: int) -> HessianSum:
        X = correlated_inputs(7, 24, seed=i).float() * 10.0 ** (i % 5 - 2)
        return accumulate(empty_hessian(24), X, torch.rand(7, generator=torch.Generator().manual_seed(i)))

    for n in (1, 2, 3, 5, 8, 11):
        parts = [part(i) for i in range(n)]
        whole = merge_tree(parts)
        # workers that merge aligned ranges of 2 or 4 parts first
        for size in (2, 4):
            ranges = [merge_tree(parts[i : i + size]) for i in range(0, n, size)]
            assert torch.equal(merge_tree(ranges).xx, whole.xx)
            assert merge_tree(ranges).weight_sum == whole.weight_sum
        assert whole.num_tokens == 7 * n
    # the order matters in fp32, so the equality above says something
    parts = [part(i) for i in range(11)]
    left_to_right = parts[0]
    for other in parts[1:]:
        left_to_right = merge(left_to_right, other)
    assert not torch.equal(left_to_right.xx, merge_tree(parts).xx)


def test_a_sum_in_place_is_the_sum_in_new_memory() -> None:
    """In every field, also those that only some sums have."""
    generator = torch.Generator().manual_seed(3)
    a, b = (
        accumulate(
            empty_hessian(6, with_first=True),
            torch.randn(9, 6, generator=generator),
            torch.rand(9, generator=generator),
        )
        for _ in range(2)
    )
    merged, memory = merge(a, b), a.xx
    found = add(a, b)
    assert found.xx is memory
    for field in fields(HessianSum):
        ours, theirs = getattr(found, field.name), getattr(merged, field.name)
        assert torch.equal(ours, theirs) if isinstance(theirs, torch.Tensor) else ours == theirs, field.name
    assert found.x is not None


def test_damped_cholesky() -> None:
    H = hessian_of(correlated_inputs(100, 20))
    H[3] = H[:, 3] = 0
    before = H.clone()
    factor = damped_cholesky(H, damping=0.1)
    assert torch.equal(H, before)
    expected = before + factor.damping * torch.eye(20)
    expected[3, 3] = 1 + factor.damping
    assert factor.damping == pytest.approx(0.1 * float(before.diagonal().sum()) / 19)
    assert (factor.num_dead, factor.num_damping_steps) == (1, 0)
    assert torch.allclose(factor.L @ factor.L.T, expected)


def test_correction_solves_the_damped_least_squares_problem() -> None:
    d_in, d_out, T = 24, 6, 400
    X = correlated_inputs(T, d_in)
    noise = torch.randn(T, d_in, generator=torch.Generator().manual_seed(8)).double()
    Xq = X + 0.3 * noise @ torch.diag(torch.linspace(0, 2, d_in).double())
    s = torch.rand(T, generator=torch.Generator().manual_seed(9)).double()
    C = (Xq.T * s) @ Xq / s.sum()
    D = ((X - Xq).T * s) @ Xq / s.sum()
    W = weights(d_out, d_in)

    P = W @ D
    full = correct(W, P, strength=1.0, cholesky=damped_cholesky(C, damping=0.0))
    root = s.sqrt().unsqueeze(1)
    solution = torch.linalg.lstsq(root * Xq, root * (X @ W.T)).solution.T
    assert torch.allclose(full, solution, atol=1e-8)

    damping = 0.02
    ridge = C + damping * C.diagonal().mean() * torch.eye(d_in)
    expected = W + 0.5 * (W @ D) @ torch.linalg.inv(ridge)
    assert torch.allclose(correct(W, P, cholesky=damped_cholesky(C, damping=damping)), expected, atol=1e-10)
    single = correct(W.float(), P.float(), cholesky=damped_cholesky(C.float(), damping=damping))
    assert torch.allclose(single.double(), expected, atol=1e-4)

    def explicit(Q: torch.Tensor) -> torch.Tensor:
        return ((X @ W.T - Xq @ Q.T).square() * s.unsqueeze(1)).sum(0) / s.sum()

    assert torch.allclose(
        target_error(W, full, C, P) - target_error(W, W, C, P), explicit(full) - explicit(W), atol=1e-10
    )
    constant = (((X - Xq) @ W.T).square() * s.unsqueeze(1)).sum(0) / s.sum()
    assert torch.allclose(target_error(W, expected, C, P) + constant, explicit(expected), atol=1e-10)
    assert (explicit(full) < explicit(expected)).all()
    assert (explicit(expected) < explicit(W)).all()


def test_scales_are_searched_with_the_hessian_given() -> None:
    W, H = weights(6, 64).float(), hessian_of(correlated_inputs(100, 64)).float()
    choice = Choice(bits=3, group_size=32)
    other = torch.diag(torch.linspace(0.01, 3, 64))
    factor = factorize(H)
    searched = search_scales(W, search_importance(factor), choice)
    assert torch.equal(gptq(W, factor, [choice])[0].scales, searched)
    assert not torch.equal(searched, search_scales(W, H.diagonal(), choice))
    assert torch.equal(gptq(W, factorize(H), [choice], H=other)[0].scales, search_scales(W, other.diagonal(), choice))
    given = search_scales(W, torch.ones(64), choice)
    assert torch.equal(gptq(W, factorize(H), [choice], scales=[given])[0].scales, given)
