"""Costs from some rows against costs of all rows in float64, and the draw against a plain one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lrpq.model.layers import Choice
from lrpq.quant.factor import factorize
from lrpq.quant.gptq import gptq, predicted_cost
from lrpq.quant.grid import Grid
from lrpq.quant.sampled_cost import draw_rows, sampled_costs

CHOICES = [Choice(bits=2, group_size=16), Choice(bits=3, group_size=16), Choice(bits=4, group_size=-1)]
D_IN = 48


def site(*rows: int, seed: int = 0) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Weights and curvature of some layers, each with rows of very different size, and their input's H."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    X = draw(400, D_IN) @ draw(D_IN, D_IN) / D_IN**0.5
    weights = [draw(n, D_IN) * draw(n, 1).exp() for n in rows]
    return weights, [(2 * draw(n)).exp().double() for n in rows], X.T @ X / len(X)


def test_rows_stand_for_what_was_foreseen() -> None:
    foreseen = torch.rand(101, generator=torch.Generator().manual_seed(1), dtype=torch.float64) ** 6
    foreseen[7], foreseen[20:25] = foreseen.sum(), 0.0
    for number in (1, 2, 9, 40, 100):
        rows, times = draw_rows(foreseen, number)
        assert float((times * foreseen[rows]).sum()) == pytest.approx(float(foreseen.sum()), rel=1e-12)
        counts = times * foreseen[rows] * number / foreseen.sum()
        assert torch.allclose(counts, counts.round(), atol=1e-9)
        assert int(counts.round().sum()) == number
        assert 7 in rows  # half of everything
        assert not set(rows.tolist()) & set(range(20, 25))
        assert rows.tolist() == sorted(set(rows.tolist()))


def test_the_draw_is_the_plain_one() -> None:
    foreseen = torch.rand(37, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    number, wanted = 10, []
    for part in range(number):
        left = (part + 0.5) / number * float(foreseen.sum())
        row = 0
        while left > float(foreseen[row]):
            left -= float(foreseen[row])
            row += 1
        wanted.append(row)
    rows, times = draw_rows(foreseen, number)
    assert rows.tolist() == sorted(set(wanted))
    for row, weight in zip(rows.tolist(), times.tolist(), strict=True):
        assert weight == pytest.approx(wanted.count(row) * float(foreseen.sum()) / number / float(foreseen[row]))


@pytest.mark.parametrize("foreseen", [torch.ones(5, dtype=torch.float64), torch.zeros(9, dtype=torch.float64)])
def test_all_rows_where_there_are_few_or_nothing_is_foreseen(foreseen: Tensor) -> None:
    rows, times = draw_rows(foreseen, 5)
    assert rows.tolist() == list(range(len(foreseen)))
    assert times.tolist() == [1.0] * len(foreseen)


def test_of_all_rows_they_are_the_costs_of_the_candidates() -> None:
    weights, curvature, H = site(24, 8)
    factor = factorize(H)
    found = sampled_costs(weights, curvature, factor, CHOICES, H, num_rows=24, grid=Grid.SIGNED)
    for W, c, costs in zip(weights, curvature, found, strict=True):
        candidates = gptq(W, factor, CHOICES, grid=Grid.SIGNED)
        assert costs == pytest.approx(predicted_cost(W, candidates, H, c), rel=1e-4)


def test_of_some_rows_they_are_the_estimate_in_float64() -> None:
    """Rows do not interact: those of the whole layer's candidates, dense and in float64, give the same."""
    weights, curvature, H = site(60, 90)
    factor = factorize(H)
    found = sampled_costs(weights, curvature, factor, CHOICES, H, num_rows=12, grid=Grid.SIGNED)
    for W, c, costs in zip(weights, curvature, found, strict=True):
        foreseen = c * W.double().square().sum(1)
        rows, _ = draw_rows(foreseen, 12)
        middles = (torch.arange(12, dtype=torch.float64) + 0.5) / 12 * foreseen.sum()
        drawn = torch.searchsorted(foreseen.cumsum(0), middles)
        assert set(rows.tolist()) == set(drawn.tolist())
        for q, cost in zip(gptq(W, factor, CHOICES, grid=Grid.SIGNED), costs, strict=True):
            dW = W.double() - q.dequantize(torch.float64)
            terms = 0.5 * c * (dW @ H.double() * dW).sum(1)
            assert cost == pytest.approx(float(foreseen.sum() * (terms / foreseen)[drawn].mean()), rel=1e-3)


def test_they_estimate_the_costs_of_whole_layers() -> None:
    """Without bias over many layers, and each within a few standard errors; ratios between widths are better still."""
    errors, ratios = [], []
    for seed in range(12):
        weights, curvature, H = site(256, seed=seed)
        factor = factorize(H)
        (costs,) = sampled_costs(weights, curvature, factor, CHOICES, H, num_rows=32, grid=Grid.SIGNED)
        whole = predicted_cost(weights[0], gptq(weights[0], factor, CHOICES, grid=Grid.SIGNED), H, curvature[0])
        logs = (torch.tensor(costs) / torch.tensor(whole)).log()
        errors.append(logs)
        ratios.append(logs[0] - logs[1])
    assert float(torch.stack(errors).abs().max()) < 0.3
    assert float(torch.stack(errors).mean().abs()) < 0.05
    assert float(torch.stack(ratios).std()) < float(torch.stack(errors)[:, 0].std()) + 0.05


def test_a_layer_without_curvature_costs_nothing() -> None:
    weights, curvature, H = site(16)
    (costs,) = sampled_costs(weights, [0 * curvature[0]], factorize(H), CHOICES, H, num_rows=4)
    assert costs == [0.0, 0.0, 0.0]
