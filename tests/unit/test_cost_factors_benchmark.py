"""The benchmark of costs' factors: where nothing hangs together all are one, behind a norm the trace's is the exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.cost_factors import FACTORS, factors
from lrpq.model.layers import Choice

TOKENS, D_OUT, D_IN = 6000, 16, 64
CHOICE = Choice(bits=3, group_size=64)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("weighting", ["plain", "weighted"])
def test_gradients_that_know_nothing_of_inputs_need_no_factor(weighting: str) -> None:
    found = factors(
        normal(TOKENS, D_IN, seed=0), normal(TOKENS, D_OUT, seed=1), weight(), CHOICE, weighting, name="layer"
    )
    assert found.keys() == {*FACTORS, "exact"}
    assert all(value == pytest.approx(1, rel=0.05) for value in found.values())


def test_long_gradients_of_short_inputs_make_products_too_large() -> None:
    """Every token's |g| is 1 / |x|: the mean of products is one, the product of means is far above it."""
    x = normal(TOKENS, D_IN, seed=0) * normal(TOKENS, 1, seed=2).exp()
    g = normal(TOKENS, D_OUT, seed=1) / x.norm(dim=1, keepdim=True)
    found = factors(x, g, weight(), CHOICE, "plain", name="layer")
    assert found["exact"] < 0.1
    for name in FACTORS[1:]:
        assert found[name] == pytest.approx(found["exact"], rel=0.2)


def test_one_token_alone_in_its_direction() -> None:
    """One token in 500 with 95% of the gradient, in a direction of its own, inputs correlated: plain GPTQ does not
    spare it, which lengths do not tell; weighted by gradients it spares it, and its own factor tells how far."""
    basis, _ = torch.linalg.qr(normal(D_IN, D_IN, seed=4))
    x = normal(TOKENS, D_IN, seed=0) * torch.linspace(2.0, 0.05, D_IN, dtype=torch.float64)
    x[::500] = 0.0
    x[::500, -1] = 3.0
    x, g = x @ basis.T, normal(TOKENS, D_OUT, seed=1)
    g[::500] *= 100.0
    plain, weighted = (factors(x, g, weight(), CHOICE, w, name="layer") for w in ("plain", "weighted"))
    assert max(plain["trace"], plain["channels"]) < 0.5 * plain["exact"] < plain["whitened"]
    assert weighted["exact"] < 0.5 * plain["exact"]
    assert weighted["whitened"] == pytest.approx(weighted["exact"], rel=0.1)


def weight() -> Tensor:
    return normal(D_OUT, D_IN, seed=9).float()
