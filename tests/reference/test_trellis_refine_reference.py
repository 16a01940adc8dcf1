"""Trellis codes that are polished and refined: best streams given all other columns, guards by segment, float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from trellis_case import CHOICE, ROWS, any_codes, by_segment, columns_of, hessian, numbers, rounded

from lrpq.model.layers import Choice
from lrpq.quant.factor import Factor, factorize
from lrpq.quant.gptq import Rows, gptq, loss
from lrpq.quant.grid import QuantizedWeight
from lrpq.quant.hessian import HessianSum
from lrpq.quant.polish import polish
from lrpq.quant.refit import refit
from lrpq.quant.row_feedback import row_weights
from lrpq.quant.trellis import SEGMENT_ROWS, segment_edges, values
from lrpq.quant.trellis_loop import descend_trellis
from lrpq.refine import quantize
from lrpq.refine.products import SiteProducts
from lrpq.refine.quantize import quantize_refined


def test_descent_takes_each_column_to_its_best_stream_given_all_others() -> None:
    """Targets Q_k + (D H)_k / H_kk with the errors D of new codes to the left and of old ones to the right, float64."""
    d_in, bits = 48, 3
    T, H, weights = numbers(ROWS, d_in, seed=12), hessian(d_in), numbers(ROWS, seed=13).abs() + 0.1
    alone = replace(factorize(H), R=torch.eye(d_in))  # codes that leave much to be improved
    (before,) = gptq(T, alone, [CHOICE], rows=Rows(parts=[ROWS], weights=weights))
    after = descend_trellis(T, before, H, weights, segment_edges([ROWS]))
    order = torch.argsort(H.diagonal(), descending=True, stable=True)
    t, old, S, _ = columns_of(T, before, order)
    _, new, _, codes = columns_of(T, after, order)
    wide = H.double()[order][:, order]
    pull = wide.triu(1).T @ (t - new) + wide.tril(0).T @ (t - old)
    targets = old + pull / wide.diagonal().unsqueeze(1)
    expected, _ = rounded(targets.float(), bits, S=S, weights=weights)
    assert (expected == codes).double().mean() > 0.99
    assert (after.codes != before.codes).double().mean() > 0.1


def test_descent_takes_a_dead_input_to_its_own_weights() -> None:
    T, H = numbers(ROWS, 32, seed=12), hessian(32)
    H[7] = H[:, 7] = 0.0
    q = replace(gptq(T, factorize(hessian(32)), [CHOICE])[0], codes=any_codes(ROWS, 32, 3))
    found = descend_trellis(T, q, H, torch.ones(ROWS), segment_edges([ROWS]))
    expected, _ = rounded(T.T[7:8].contiguous(), 3, S=q.scales.T[:1].float())
    assert (found.codes[:, 7] == expected[0]).double().mean() > 0.99


@pytest.mark.parametrize("rounds", [1, 2])
def test_polish_raises_no_segments_error(rounds: int) -> None:
    """Rows weighed as they were rounded; restored rows are whole segments."""
    d_in = 48
    T, H, weights = numbers(ROWS, d_in, seed=14), hessian(d_in), numbers(ROWS, seed=15).abs() + 0.1
    rows = Rows(parts=[ROWS], weights=weights)
    (before,) = gptq(T, factorize(H), [CHOICE], rows=rows)
    (found,) = polish(T, [before], H, rounds=rounds, rows=rows)
    sums = [
        by_segment(loss(T.double(), q.dequantize().double(), H.double()) * weights.double())
        for q in (found.weight, before)
    ]
    assert (sums[0] <= sums[1] * (1 + 1e-5)).all()
    assert sums[0].sum() < 0.95 * sums[1].sum()
    assert found.changed_codes > 0.01 * T.numel()
    assert all(part.all() or not part.any() for part in torch.split(found.restored, SEGMENT_ROWS))


def test_polish_restores_whole_segments() -> None:
    """A damping so large that descent is blind to H, and makes GPTQ's codes worse."""
    T, H = numbers(ROWS, 48, seed=16), hessian(48)
    (before,) = gptq(T, factorize(H), [CHOICE])
    (found,) = polish(T, [before], H, damping=1e4)
    assert found.restored.all()
    assert torch.equal(found.weight.codes, before.codes)
    assert torch.equal(found.weight.scales, before.scales)


def test_refit_keeps_codes_and_lowers_every_rows_error() -> None:
    T, H = numbers(ROWS, 48, seed=17), hessian(48)
    (q,) = gptq(T, factorize(H), [CHOICE])
    found = refit(T, q, H)
    assert torch.equal(found.weight.codes, q.codes)
    errors = [loss(T.double(), x.dequantize().double(), H.double()) for x in (found.weight, q)]
    assert (errors[0] <= errors[1] * (1 + 1e-6)).all()
    assert errors[0].sum() < 0.96 * errors[1].sum()
    # the best scales of a row by least squares over its groups, in float64, are at most a rounding to bfloat16 better
    L = torch.linalg.cholesky(H.double())
    Z = values(q.codes, 3).double()
    for row in range(0, ROWS, 60):
        parts = torch.stack([L[g : g + 16].T @ Z[row, g : g + 16] for g in (0, 16, 32)], 1)
        target = L.T @ T[row].double()
        best = torch.linalg.lstsq(parts, target.unsqueeze(1)).solution
        least = (parts @ best - target.unsqueeze(1)).square().sum()
        assert least * (1 - 1e-9) <= errors[0][row] <= least * 1.01


# refinement


def moments(seed: int) -> Tensor:
    """Second moments of gradients that share 40 directions."""
    shared = numbers(4 * ROWS, 40, seed=seed) @ numbers(40, ROWS, seed=seed + 1) / 40**0.5
    together = shared + 0.3 * numbers(4 * ROWS, ROWS, seed=seed + 2)
    G: Tensor = together.T @ together / len(together)
    return G


def test_rows_make_up_for_each_others_errors_behind_a_corrected_prefix() -> None:
    """Excess of the joint error over that of the best real weights, float64; lower than of rows that do not see each
    other and than of a uniform grid, and as the codes decode."""
    d_in = 32
    lost, x = (numbers(400, d_in, seed=s) @ numbers(d_in, d_in, seed=s + 1) / d_in**0.5 for s in (20, 22))
    W, G = numbers(ROWS, d_in, seed=24), moments(25)
    D = 0.1 * lost.T @ x
    sums = HessianSum(xx=(x.T @ x).triu(), weight_sum=float(len(x)), num_tokens=len(x))
    C, P = (x.T @ x).double() / len(x), W.double() @ D.double() / len(x)

    def excess(choice: Choice, outputs: list[Tensor] | None) -> float:
        refined = quantize_refined(
            W, SiteProducts(hessian=sums, shift=D), choice, strength=1.0, outputs=outputs, row_blocks=3, name="w"
        )
        assert refined.rows_alone == 0
        E = refined.weight.dequantize().double() - W.double() - torch.linalg.solve(C, P.T).T
        return float(torch.trace(G.double() @ E @ C @ E.T))

    found = excess(CHOICE, [G])
    nothing = W.double() + torch.linalg.solve(C, P.T).T
    assert found < 0.6 * excess(CHOICE, None)
    assert found < 0.8 * excess(replace(CHOICE, trellis=False), [G])
    assert found < 0.01 * float(torch.trace(G.double() @ nothing @ C @ nothing.T))


def test_the_better_of_plain_and_corrected_codes_is_kept_by_segments() -> None:
    """A correction that hardly matters: rows gain and lose side by side, and segments stay whole."""
    d_in = 32
    W, H, D = numbers(ROWS, d_in, seed=30), hessian(d_in), 0.002 * numbers(d_in, d_in, seed=34)
    products = SiteProducts(hessian=HessianSum(xx=H.triu(), weight_sum=1.0, num_tokens=400), shift=D)
    kept, plain = (
        quantize_refined(W, products, CHOICE, strength=strength, polish_rounds=0, name="w") for strength in (1.0, 0.0)
    )
    same = [part.all() for part in torch.split(kept.weight.codes == plain.weight.codes, SEGMENT_ROWS)]
    assert kept.rejected_rows == sum(size for size, whole in zip((128, 128, 44), same, strict=True) if whole)
    errors = []
    for refined in (kept, plain):
        dW = refined.weight.dequantize().double() - W.double()
        errors.append(((dW @ H.double() - 2.0 * W.double() @ D.double()) * dW).sum(1))
    assert (by_segment(errors[0]) <= by_segment(errors[1]) + 1e-4).all()
    assert (errors[0] > errors[1]).double().mean() > 0.05


@pytest.mark.parametrize("in_doubt", [False, True])
def test_rows_on_their_own_are_rounded_where_blocks_may_be_worse(
    in_doubt: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uniform codes stand in for them; streams are made where those leave it open, and kept where they are better."""
    H, G = hessian(32), moments(40)
    W, sums = numbers(ROWS, 32, seed=41), HessianSum(xx=H.triu(), weight_sum=1.0, num_tokens=400)
    rounded: list[Choice] = []

    def noting(W: Tensor, factor: Factor, choices: list[Choice], **options: Any) -> list[QuantizedWeight]:
        rounded.extend(choices)
        return gptq(W, factor, choices, **options)

    monkeypatch.setattr(quantize, "gptq", noting)
    monkeypatch.setattr(quantize, "_share", lambda _: 0.0 if in_doubt else 0.6)
    products = SiteProducts(hessian=sums, shift=None)
    refined = quantize_refined(W, products, CHOICE, strength=0.0, outputs=[G], row_blocks=3, name="w")
    assert rounded == [replace(CHOICE, trellis=False)] + [CHOICE] * in_doubt
    assert refined.rows_alone == 0
    (alone,) = gptq(W, factorize(H), [CHOICE], rows=Rows(parts=[ROWS], weights=row_weights([G])))

    def joint(q: QuantizedWeight) -> float:
        dW = (W - q.dequantize(torch.float32)).double()
        return float(torch.trace(G.double() @ dW @ H.double() @ dW.T))

    assert joint(refined.weight) < 0.8 * joint(alone)
    if in_doubt:  # blocks that are worse: rounded without what they do to each other, and far off
        monkeypatch.setattr(quantize.Rounding, "in_blocks", lambda self, T, S, *_, **__: _off(T, S))
        kept = quantize_refined(W, products, CHOICE, strength=0.0, outputs=[G], row_blocks=3, polish_rounds=0, name="w")
        assert kept.rows_alone == 1
        assert torch.equal(kept.weight.codes, alone.codes)


def _off(T: Tensor, scales: Tensor) -> QuantizedWeight:
    return QuantizedWeight(codes=any_codes(len(T), T.shape[1], CHOICE.bits), scales=scales.bfloat16(), choice=CHOICE)


def test_an_error_that_is_no_number_leaves_no_uniform_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in for streams is not what a caller gets, who would read it as streams."""
    monkeypatch.setattr(quantize, "joint_error", lambda *_: torch.tensor(torch.nan, dtype=torch.float64))
    products = SiteProducts(hessian=HessianSum(xx=hessian(32).triu(), weight_sum=1.0, num_tokens=400), shift=None)
    W, outputs = numbers(ROWS, 32, seed=41), [moments(40)]
    refined = quantize_refined(W, products, CHOICE, strength=0.0, outputs=outputs, row_blocks=3, name="w")
    assert refined.weight.choice == CHOICE


def test_stand_ins_choose_by_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """A correction that hardly matters, as above: of a segment all rows are corrected or none."""
    d_in, targets = 32, []
    W, H, D = numbers(ROWS, d_in, seed=30), hessian(d_in), 0.002 * numbers(d_in, d_in, seed=34)
    blocks = quantize.RowBlocks

    def noting(T: Tensor, *arguments: Any, **options: Any) -> Any:
        targets.append(T)
        return blocks(T, *arguments, **options)

    monkeypatch.setattr(quantize, "RowBlocks", noting)
    products = SiteProducts(hessian=HessianSum(xx=H.triu(), weight_sum=1.0, num_tokens=400), shift=D)
    quantize_refined(W, products, CHOICE, strength=1.0, outputs=[moments(40)], row_blocks=3, name="w")
    (target,) = targets
    plain = (target == W).all(1)
    assert 0 < int(plain.sum()) < ROWS
    assert all(part.all() or not part.any() for part in torch.split(plain, SEGMENT_ROWS))
