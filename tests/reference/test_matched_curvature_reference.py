"""What rounding is predicted to cost, against sums over tokens in float64, in layers that norms come behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lrpq.model.layers import Choice
from lrpq.quant.gptq import predicted_cost
from lrpq.quant.grid import QuantizedWeight
from lrpq.quant.matched_curvature import MOST, bounded_sum, matched_curvature, trace_of
from lrpq.quant.rtn import round_to_nearest

TOKENS, D_OUT, D_IN = 4000, 24, 32
CHOICES = [Choice(bits=bits, group_size=-1) for bits in (3, 4, 6)]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(spread: float) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, inputs whose lengths differ by exp(spread), and gradients of a norm: long where outputs are short."""
    W = normal(D_OUT, D_IN, seed=0)
    x = normal(TOKENS, D_IN, seed=1) * (spread * normal(TOKENS, 1, seed=2)).exp()
    y = x @ W.T
    g = normal(TOKENS, D_OUT, seed=3) / y.norm(dim=1, keepdim=True) * torch.linspace(0.5, 2.0, D_OUT)
    return W, x, g


def weighted(x: Tensor, g: Tensor, power: float) -> Tensor:
    s = (g.square().mean(1) + 0.03 * g.square().mean()).pow(power)
    return (x.T * s) @ x / s.sum()


def exact(W: Tensor, q: QuantizedWeight, x: Tensor, g: Tensor) -> float:
    """1/2 mean_t sum_j g_tj^2 (dW_j x_t)^2, rows by themselves, as costs are."""
    errors = (q.dequantize(torch.float64) - W) @ x.T
    return 0.5 * float((g.T.square() * errors.square()).sum()) / len(x)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("spread", [0.0, 1.0, 2.0])
def test_costs_behind_a_norm_are_those_of_the_tokens(spread: float, power: float) -> None:
    """Where gradients are long because inputs are short, the means' product would be up to thousands of times that."""
    W, x, g = layer(spread)
    H, c = weighted(x, g, power), g.square().mean(0)
    trace = (g.square().sum(1) * x.square().sum(1)).mean()
    rounded = [round_to_nearest(W, choice) for choice in CHOICES]
    wanted = [exact(W, q, x, g) for q in rounded]
    found = predicted_cost(W, rounded, H, matched_curvature(c, trace, trace_of(H)))
    plain = predicted_cost(W, rounded, H, c)
    for one, other, truth in zip(found, plain, wanted, strict=True):
        assert one == pytest.approx(truth, rel=0.15)
        assert spread == 0.0 or power == 1.0 or other > 2 * truth


def test_the_product_has_the_trace() -> None:
    W, x, g = layer(1.0)
    H, c = weighted(x, g, 0.5), g.square().mean(0)
    trace = float((g.square().sum(1) * x.square().sum(1)).mean())
    matched = matched_curvature(c, trace, trace_of(H))
    assert float(matched.sum() * H.diagonal().sum()) == pytest.approx(trace, rel=1e-12)
    torch.testing.assert_close(matched / matched.sum(), c / c.sum())
    assert W.shape == (len(matched), len(H))


def test_where_nothing_arrives_costs_are_nothing() -> None:
    assert torch.equal(matched_curvature(torch.zeros(3), torch.zeros(1), 4.0), torch.zeros(3, dtype=torch.float64))
    c = torch.ones(3, dtype=torch.float64)
    assert torch.equal(matched_curvature(c, 0.0, 0.0), c)


def test_no_window_is_the_whole_trace() -> None:
    """Behind a norm one token's output nearly vanishes; costs are those of the other windows."""
    _, x, g = layer(1.0)
    g = g.clone()
    g[777] *= 1e4
    products = (g.square().sum(1) * x.square().sum(1)).view(40, 100)
    others = float(products[torch.arange(40) != 7].mean(1).mean())
    assert float(products.mean()) > 1e4 * others
    assert float(bounded_sum(products.sum(1))) / TOKENS == pytest.approx(others, rel=0.15)


def test_what_every_window_has_counts_in_full() -> None:
    """The first token of a window has nearly all of what it has, in every window."""
    _, x, g = layer(0.5)
    products = (g.square().sum(1) * x.square().sum(1)).view(40, 100)
    products[:, 0] *= 1e4
    windows = products.sum(1)
    assert float(windows.max()) < MOST * float(windows.median())
    assert float(bounded_sum(windows)) == pytest.approx(float(products.sum()), rel=1e-12)


def test_windows_without_a_token_in_a_layer_do_not_bound_the_others() -> None:
    windows = torch.zeros(9, dtype=torch.float64)
    assert float(bounded_sum(windows)) == 0
    windows[:3] = torch.tensor([1.0, 2.0, 1e9])
    assert float(bounded_sum(windows)) == 1 + 2 + 2 * MOST
    assert float(bounded_sum(torch.tensor([5.0], dtype=torch.float64))) == 5
    assert float(bounded_sum(torch.tensor(5.0, dtype=torch.float64))) == 5
