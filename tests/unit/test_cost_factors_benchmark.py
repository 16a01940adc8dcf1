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
    """An input that no other token has, with nearly all of the gradient: plain GPTQ does not spare it, and a factor by
    lengths does not see that; weighted by gradients GPTQ does, and the product is far too large."""
    x = normal(TOKENS, D_IN, seed=0)
    g = normal(TOKENS, D_OUT, seed=1)
    x[::500, :] = 0.0
    x[::500, 0] = 4.0  # shorter than the others
    x[:, 0] += 0.01 * normal(TOKENS, seed=3)
    g[::500] *= 100.0
    plain, weighted = (factors(x, g, weight(), CHOICE, w, name="layer") for w in ("plain", "weighted"))
    assert weighted["exact"] < plain["exact"]
    assert weighted["exact"] < 0.5


def weight() -> Tensor:
    return normal(D_OUT, D_IN, seed=9).float()
