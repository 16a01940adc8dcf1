"""Descent, refit, polish and low-rank correction in float64, against brute force and dense least squares."""

import itertools

import pytest
import torch

from lrpq.errors import QuantizationError
from lrpq.model.layers import Choice
from lrpq.quant.best_rows import MULTIPLIERS, gptq_best_rows
from lrpq.quant.descent import descend
from lrpq.quant.factor import factorize
from lrpq.quant.gptq import gptq, loss
from lrpq.quant.grid import Grid, QuantizedWeight, code_range
from lrpq.quant.hessian import damped_cholesky
from lrpq.quant.importance import search_importance
from lrpq.quant.lowrank import low_rank, storage_bits
from lrpq.quant.polish import polish
from lrpq.quant.refit import refit
from lrpq.quant.rtn import round_to_nearest


def layer(d_out: int, d_in: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and a Hessian of strongly correlated inputs, float64."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(d_out, d_in, generator=generator).double()
    X = torch.randn(3 * d_in + 5, d_in, generator=generator).double()
    X = X @ (torch.eye(d_in).double() + torch.randn(d_in, d_in, generator=generator).double() / d_in**0.5)
    X = X + torch.randn(len(X), 1, generator=generator).double()
    return W, X.T @ X / len(X)


def row_losses(W: torch.Tensor, q: QuantizedWeight, H: torch.Tensor) -> torch.Tensor:
    dW = W - q.dequantize(torch.float64)
    return torch.einsum("oi,ij,oj->o", dW, H, dW)


def with_codes(q: QuantizedWeight, codes: torch.Tensor) -> QuantizedWeight:
    return QuantizedWeight(codes=codes, scales=q.scales, choice=q.choice, zero_points=q.zero_points)


@pytest.mark.parametrize("grid", list(Grid))
def test_no_single_code_can_lower_the_error_at_the_end(grid: Grid) -> None:
    W, H = layer(6, 24)
    start = gptq(W, factorize(H), [Choice(bits=b, group_size=8) for b in (2, 3, 4)], grid=grid)
    for found, before in zip(descend(W, start, H, sweeps=100), start, strict=True):
        assert found.unsettled_rows == 0
        q = found.weight
        assert found.changed_codes == int((q.codes != before.codes).sum())
        least = row_losses(W, q, H)
        assert (least <= row_losses(W, before, H)).all()
        low, high = code_range(q.choice.bits)
        for column, code in itertools.product(range(24), range(low, high + 1)):
            other = q.codes.clone()
            other[:, column] = code
            assert (row_losses(W, with_codes(q, other), H) >= least * (1 - 1e-12)).all()


def test_descent_reaches_the_best_of_all_codes_where_it_has_no_choice_but_them() -> None:
    """Two columns, every combination tried: never below the optimum, at it in most rows, and well below GPTQ's."""
    W, _ = layer(200, 2)
    H = torch.tensor([[1.0, 0.6], [0.6, 0.8]]).double()
    choice = Choice(bits=3, group_size=-1)
    plain = round_to_nearest(W, choice)
    found = descend(W, [plain], H, sweeps=50)[0].weight
    everything = [
        row_losses(W, with_codes(plain, torch.tensor(pair, dtype=torch.int8).expand(200, 2)), H)
        for pair in itertools.product(range(-4, 4), repeat=2)
    ]
    best = torch.stack(everything).amin(0)
    assert (row_losses(W, found, H) >= best - 1e-12).all()
    reached = (row_losses(W, found, H) <= best + 1e-12).double().mean()
    assert reached > 0.8
    assert reached > (row_losses(W, plain, H) <= best + 1e-12).double().mean() + 0.1


def one_code_at_a_time(W: torch.Tensor, q: QuantizedWeight, H: torch.Tensor, sweeps: int) -> torch.Tensor:
    """The best code of each column in turn, by trying all: no gradient, no blocks."""
    low, high = code_range(q.choice.bits)
    codes = q.codes.clone()
    for _, column in itertools.product(range(sweeps), range(codes.shape[1])):
        tried = []
        for code in range(low, high + 1):
            other = codes.clone()
            other[:, column] = code
            tried.append(row_losses(W, with_codes(q, other), H))
        codes[:, column] = (torch.stack(tried).argmin(0) + low).to(torch.int8)
    return codes


@pytest.mark.parametrize("group_size", [4, -1])
@pytest.mark.parametrize("sweeps", [1, 2, 3])
def test_a_sweep_takes_the_best_code_of_every_column_in_turn(group_size: int, sweeps: int) -> None:
    W, H = layer(9, 20, seed=1)
    for bits in (2, 3):
        start = round_to_nearest(W, Choice(bits=bits, group_size=group_size), grid=Grid.SIGNED)
        expected = one_code_at_a_time(W, start, H, sweeps)
        for block_columns in (1, 3, 11, 64):
            (found,) = descend(W, [start], H, sweeps=sweeps, block_columns=block_columns)
            assert torch.equal(found.weight.codes, expected)


def test_descent_from_rounding_is_no_small_step() -> None:
    """Fails if descent does nothing."""
    W, H = layer(32, 64)
    choices = [Choice(bits=bits, group_size=16) for bits in (2, 3, 4)]
    plain = [round_to_nearest(W, choice, importance=H.diagonal()) for choice in choices]
    for found, before in zip(descend(W, plain, H, sweeps=8), plain, strict=True):
        assert found.changed_codes > 0.05 * W.numel()
        assert (row_losses(W, found.weight, H) <= row_losses(W, before, H)).all()
        assert (row_losses(W, found.weight, H) < row_losses(W, before, H)).sum() >= 30  # a row may be settled
        assert row_losses(W, found.weight, H).sum() < 0.6 * row_losses(W, before, H).sum()
        assert torch.equal(found.weight.scales, before.scales)


@pytest.mark.parametrize("grid", list(Grid))
@pytest.mark.parametrize("group_size", [8, -1])
def test_refitted_scales_are_the_dense_least_squares_ones(grid: Grid, group_size: int) -> None:
    W, H = layer(12, 32)
    (start,) = gptq(W, factorize(H), [Choice(bits=3, group_size=group_size)], grid=grid)
    fitted = refit(W, start, H)
    groups = start.scales.shape[1]
    L = torch.linalg.cholesky(H)
    steps = start.codes.view(12, groups, -1).double()
    if start.zero_points is not None:
        steps = steps - start.zero_points.unsqueeze(2)
    changed = 0
    for row in range(12):
        columns = torch.stack([torch.block_diag(*steps[row].unsqueeze(1))[g] @ L for g in range(groups)], dim=1)
        expected = torch.linalg.lstsq(columns, L.T @ W[row]).solution.bfloat16()
        if torch.equal(fitted.weight.scales[row], start.scales[row]):
            continue
        changed += 1
        assert torch.equal(fitted.weight.scales[row], expected)
    assert changed == 12 - fitted.rejected_rows
    assert changed > 6
    assert (row_losses(W, fitted.weight, H) <= row_losses(W, start, H)).all()
    assert (row_losses(W, fitted.weight, H) < row_losses(W, start, H)).sum() == changed


def test_refit_leaves_what_it_cannot_improve() -> None:
    W, H = layer(5, 16)
    (start,) = gptq(W, factorize(H), [Choice(bits=4, group_size=8)])
    exact = start.dequantize(torch.float64)  # the error is zero: no scale is better
    fitted = refit(exact, start, H)
    assert fitted.rejected_rows == 5
    assert torch.equal(fitted.weight.scales, start.scales)
    # a group without codes has any scale; a positive scale never turns negative
    codes = start.codes.clone()
    codes[:, :8] = 0
    fitted = refit(W, with_codes(start, codes), H)
    assert torch.equal(fitted.weight.scales[:, 0], start.scales[:, 0])
    flipped = refit(-W, start, H)
    assert (flipped.weight.scales > 0).all()
    assert flipped.rejected_rows == 5


def test_polish_never_worsens_a_row_on_the_undamped_hessian() -> None:
    W, H = layer(40, 64)
    start = gptq(W, factorize(H), [Choice(bits=b, group_size=16) for b in (2, 3, 4)], grid=Grid.SIGNED)
    for damping in (0.0, 0.03, 3.0):
        for found, before in zip(polish(W, start, H, damping=damping), start, strict=True):
            now, then = row_losses(W, found.weight, H), row_losses(W, before, H)
            assert (now <= then * (1 + 1e-12)).all()
            assert now.sum() < then.sum()
            assert found.changed_codes == int((found.weight.codes != before.codes).sum())
            assert found.changed_scales == int((found.weight.scales != before.scales).sum())
            assert (found.restored_rows > 0) == (damping > 1)
    more = polish(W, start, H, damping=0.0, rounds=6)
    for a, b in zip(more, polish(W, start, H, damping=0.0, rounds=1), strict=True):
        assert row_losses(W, a.weight, H).sum() < row_losses(W, b.weight, H).sum()
    for a, b in zip(polish(W, start, H, rounds=0), start, strict=True):
        assert torch.equal(a.weight.codes, b.codes)


def test_polish_takes_the_target_it_is_given() -> None:
    """A corrected target is what the error is measured from."""
    W, H = layer(8, 32)
    (start,) = gptq(W, factorize(H), [Choice(bits=3, group_size=16)])
    T = W + 0.2 * layer(8, 32, seed=9)[0]
    (found,) = polish(T, [start], H)
    assert row_losses(T, found.weight, H).sum() < 0.6 * row_losses(T, start, H).sum()


def test_search_importance_lies_between_its_ends() -> None:
    _, H = layer(1, 48)
    H[5] = H[:, 5] = 0.0
    factor = factorize(H)
    assert torch.equal(search_importance(factor, share=0.0), H.diagonal())
    conditional = search_importance(factor, share=1.0)
    damped = H + factor.damping * torch.eye(48, dtype=torch.float64)
    order = factor.order.tolist()
    for place, column in enumerate(order):  # the variance left when later columns of the sweep explain the input
        later = order[place + 1 :]
        if column == 5:
            assert conditional[column] == 0
            continue
        alive = [k for k in later if k != 5]
        answered = damped[column, alive] @ torch.linalg.solve(damped[alive][:, alive], damped[alive, column])
        assert conditional[column] == pytest.approx(float(damped[column, column] - answered), rel=1e-9)
    mixed = search_importance(factor, share=0.5)
    assert torch.allclose(mixed.square(), H.diagonal() * conditional)
    with pytest.raises(QuantizationError, match="o_proj: the share"):
        search_importance(factor, share=1.5, name="o_proj")


def test_low_rank_correction_is_exact_at_full_rank_and_falls_with_rank() -> None:
    W, H = layer(24, 16)
    (q,) = gptq(W, factorize(H), [Choice(bits=2, group_size=-1)])
    residual = W - q.dequantize(torch.float64)
    L = damped_cholesky(H, damping=0.0).L
    identity = torch.eye(16).double()
    errors = {}
    for kind, factor in (("plain", None), ("weighted", L)):
        for rank in (1, 4, 8, 16):
            correction = low_rank(residual, rank, L=factor)
            assert correction.storage_bits == 16 * (correction.A.numel() + correction.B.numel())
            assert correction.storage_bits == storage_bits(24, 16, rank) == 16 * rank * 40
            left = residual - correction.dense(torch.float64)
            errors[kind, rank] = float(loss(left, 0 * left, H).sum()), float(loss(left, 0 * left, identity).sum())
    scale = float(loss(residual, 0 * residual, H).sum()), float(loss(residual, 0 * residual, identity).sum())
    for kind, index in (("weighted", 0), ("plain", 1)):
        values = [errors[kind, rank][index] / scale[index] for rank in (1, 4, 8, 16)]
        assert values == sorted(values, reverse=True)
        assert values[0] < 1
        assert values[-1] < 1e-4  # bfloat16 of the factors
    for rank in (1, 4, 8):  # each is the best in its own norm
        assert errors["weighted", rank][0] < errors["plain", rank][0]
        assert errors["plain", rank][1] < errors["weighted", rank][1]
    S = torch.linalg.svdvals(residual @ L)
    assert errors["weighted", 4][0] == pytest.approx(float(S[4:].square().sum()), rel=1e-2)
    with pytest.raises(QuantizationError, match="up_proj: rank 17 of a 24 x 16 layer"):
        low_rank(residual, 17, name="up_proj")


@pytest.mark.parametrize("grid", list(Grid))
def test_every_row_keeps_its_best_scales(grid: Grid) -> None:
    W, H = layer(50, 32)
    factor, choices = factorize(H), [Choice(bits=b, group_size=g) for b, g in ((2, 16), (3, -1))]
    plain = gptq(W, factor, choices, grid=grid)
    found = gptq_best_rows(W, factor, choices, H, scales=[q.scales for q in plain], grid=grid)
    for i, (q, start) in enumerate(zip(found, plain, strict=True)):
        each = []
        for multiplier in MULTIPLIERS:
            scales = [(s.scales.double() * multiplier).bfloat16() for s in plain]
            each.append(row_losses(W, gptq(W, factor, choices, scales=scales, grid=grid)[i], H))
        assert torch.allclose(row_losses(W, q, H), torch.stack(each).amin(0), rtol=1e-12)
        assert 0 < (q.scales == start.scales).all(1).sum() < 50
    with pytest.raises(QuantizationError, match="down_proj: give at least one multiplier"):
        gptq_best_rows(W, factor, choices, H, scales=[], name="down_proj")
