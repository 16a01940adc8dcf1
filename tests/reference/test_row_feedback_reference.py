"""Rows that make up for each other's errors, against explicit inverses and sums over tokens, in float64."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from lrpq.errors import QuantizationError
from lrpq.model.layers import Choice
from lrpq.quant.factor import factorize
from lrpq.quant.gptq import Rounding, Rows, gptq
from lrpq.quant.grid import Grid, QuantizedWeight
from lrpq.quant.hessian import HessianSum
from lrpq.quant.polish import Polisher
from lrpq.quant.row_feedback import RoundRows, RowBlocks, joint_error
from lrpq.quant.rtn import round_to_nearest
from lrpq.refine.products import SiteProducts
from lrpq.refine.quantize import Refined, quantize_refined
from lrpq.refine.row_parts import row_parts
from lrpq.relevance.outputs import CHUNK_ROWS, add_outputs, empty_outputs, merge_outputs, num_chunks

ROWS, COLUMNS = 512, 24
CHOICE = Choice(bits=3, group_size=-1)


def moments(seed: int, rows: int = ROWS, *, rank: int = 40) -> Tensor:
    """Second moments of gradients that share ``rank`` directions."""
    g = torch.Generator().manual_seed(seed)
    shared = torch.randn(4 * rows, rank, generator=g, dtype=torch.float64) @ torch.randn(
        rank, rows, generator=g, dtype=torch.float64
    )
    own = torch.randn(4 * rows, rows, generator=g, dtype=torch.float64)
    together = shared / rank**0.5 + 0.3 * own
    return together.T @ together / len(together)


def weights(seed: int, rows: int = ROWS) -> Tensor:
    return torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def nearest(T: Tensor, scales: Tensor | None = None) -> QuantizedWeight:
    """With scales of its own or these, one a row."""
    if scales is None:
        return round_to_nearest(T, CHOICE)
    codes = (T / scales.to(T.dtype)).round().clamp(-4, 3).to(torch.int8)
    return QuantizedWeight(codes=codes, scales=scales, choice=CHOICE)


def quantize_in_blocks(
    T: Tensor, outputs: list[Tensor], round_rows: RoundRows, *, num_blocks: int, damping: float = 0.5
) -> QuantizedWeight:
    """Rounded, and nothing improved."""
    blocks = RowBlocks(T, nearest(T).scales, outputs, num_blocks=num_blocks, damping=damping)
    blocks.round(round_rows)
    return blocks.weight()


@pytest.mark.parametrize("num_blocks", [2, 3, 4])
def test_targets_are_those_of_explicit_inverses(num_blocks: int) -> None:
    T, G, damping = weights(0), moments(1), 0.05
    found = quantize_in_blocks(T, [G], nearest, num_blocks=num_blocks, damping=damping)

    damped = G + damping * G.diagonal().mean() * torch.eye(ROWS, dtype=torch.float64)
    order = torch.argsort(G.diagonal(), descending=True, stable=True)
    D = torch.zeros_like(T)
    codes, scales = torch.empty_like(found.codes), nearest(T).scales
    for block in order.split(-(-ROWS // num_blocks)):
        done = order[: int((order == block[0]).nonzero())]
        left = order[len(done) :]
        # the best errors of the rows that are left: G_LL D_L = - G_LA D_A
        best = torch.zeros_like(T)
        best[left] = torch.linalg.inv(damped[left][:, left]) @ damped[left][:, done] @ D[done]
        q = nearest((T + best)[block], scales[block])
        codes[block] = q.codes
        D[block] = T[block] - q.dequantize(torch.float64)
    assert torch.equal(found.codes, codes)
    assert torch.equal(found.scales, scales)


@pytest.mark.parametrize("moved_at_once", [0, ROWS * COLUMNS])
@pytest.mark.parametrize("at_once", [None, 100 * COLUMNS])
def test_improved_rows_see_the_errors_that_the_others_had(
    monkeypatch: pytest.MonkeyPatch, at_once: int | None, moved_at_once: int
) -> None:
    """Targets by explicit inverses, all rows at once or some at a time; twice, so that errors are those of the last."""
    monkeypatch.setattr("lrpq.quant.row_feedback.MOVED_AT_ONCE", moved_at_once)
    if at_once is not None:
        monkeypatch.setattr("lrpq.quant.row_feedback.IMPROVED_ELEMENTS", at_once)
    T, G, damping, num_blocks = weights(0), moments(1), 0.05, 4
    damped = G + damping * G.diagonal().mean() * torch.eye(ROWS, dtype=torch.float64)
    order = torch.argsort(G.diagonal(), descending=True, stable=True)
    seen: list[Tensor] = []

    def improved(targets: Tensor, found: QuantizedWeight, rows: Rows) -> QuantizedWeight:
        assert found.codes.shape == targets.shape
        assert rows.parts == (len(targets),)
        seen.append(targets.clone())
        return nearest(0.9 * targets)

    blocks = RowBlocks(T, nearest(T).scales, [G], num_blocks=num_blocks, damping=damping)
    blocks.round(nearest)
    for _ in range(2):
        D = T - blocks.weight().dequantize(torch.float64)
        seen.clear()
        blocks.improve(improved)
        expected = T.clone()
        for block in order.split(ROWS // num_blocks):
            done = order[: int((order == block[0]).nonzero())]
            left = order[len(done) :]
            best = torch.zeros_like(T)
            best[left] = torch.linalg.inv(damped[left][:, left]) @ damped[left][:, done] @ D[done]
            expected[block] += best[block]
        assert len(seen) == (1 if at_once is None else 4)
        torch.testing.assert_close(torch.cat(seen), expected[order], rtol=1e-9, atol=1e-9)
        wanted = nearest(0.9 * torch.cat(seen))
        assert torch.equal(blocks.weight().codes[order], wanted.codes)
        assert torch.equal(blocks.weight().scales[order], wanted.scales)


def inputs(seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(400, COLUMNS, generator=g) @ torch.randn(COLUMNS, COLUMNS, generator=g)


def sums_of(x: Tensor) -> SiteProducts:
    return SiteProducts(hessian=HessianSum(xx=x.T @ x, weight_sum=float(len(x)), num_tokens=len(x)), shift=None)


def mildly_together(seed: int) -> Tensor:
    """Second moments whose correlations are below a tenth."""
    G = moments(seed).float()
    return G + 20 * G.diagonal().mean() * torch.eye(ROWS)


def test_polished_blocks_leave_less_of_the_joint_error() -> None:
    """Than blocks that are not polished, and than polished rows that do not see each other."""
    how = {"strength": 0.0, "name": "w"}
    errors = {"polished": 0.0, "not polished": 0.0, "alone": 0.0}
    for seed in range(4):
        x, W, G = inputs(seed), weights(seed).float(), mildly_together(10 + seed)
        found = {
            "polished": quantize_refined(W, sums_of(x), CHOICE, outputs=[G], row_blocks=8, polish_rounds=2, **how),
            "not polished": quantize_refined(W, sums_of(x), CHOICE, outputs=[G], row_blocks=8, polish_rounds=0, **how),
            "alone": quantize_refined(W, sums_of(x), CHOICE, outputs=None, polish_rounds=2, **how),
        }
        for name, refined in found.items():
            dW = refined.weight.dequantize(torch.float32) - W
            errors[name] += float(joint_error(dW, x.T @ x / len(x), None, [G]))
    assert errors["polished"] < 0.95 * errors["not polished"]
    assert errors["polished"] < errors["alone"]


def test_a_polish_that_raises_the_joint_error_is_given_up() -> None:
    """Outputs that depend on each other so much that to polish them all at once is worse than not to."""
    x, W, G = inputs(0), weights(0).float(), moments(10).float()
    C, how = x.T @ x / len(x), {"strength": 0.0, "outputs": [G], "row_blocks": 8, "name": "w"}
    kept, plain = (quantize_refined(W, sums_of(x), CHOICE, polish_rounds=rounds, **how) for rounds in (2, 0))
    assert torch.equal(kept.weight.codes, plain.weight.codes)

    rounding, polisher = Rounding(factorize(C), [CHOICE], grid=Grid.SIGNED), Polisher(C)
    blocks = RowBlocks(W, rounding(W)[0].scales, [G], num_blocks=8)
    blocks.round(lambda T, scales: rounding(T, [scales])[0])
    blocks.improve(lambda T, q, rows: polisher(T, [q], rounds=1, rows=rows)[0].weight)
    polished, before = (
        float(joint_error(q.dequantize(torch.float32) - W, C, None, [G])) for q in (blocks.weight(), plain.weight)
    )
    assert polished > 1.1 * before


def test_outputs_that_do_not_work_together_change_nothing() -> None:
    T = weights(2)
    G = torch.diag(torch.rand(ROWS, dtype=torch.float64) + 0.1)
    found, alone = quantize_in_blocks(T, [G], nearest, num_blocks=4), nearest(T)
    assert torch.equal(found.codes, alone.codes)
    assert torch.equal(found.scales, alone.scales)


def test_more_blocks_leave_less_of_the_joint_error() -> None:
    C = torch.eye(COLUMNS, dtype=torch.float64)
    errors = []
    for num_blocks in (1, 2, 4):
        total = torch.zeros((), dtype=torch.float64)
        for seed in range(4):
            T, G = weights(seed), moments(10 + seed)
            q = quantize_in_blocks(T, [G], nearest, num_blocks=num_blocks, damping=0.01)
            total += joint_error(q.dequantize(torch.float64) - T, C, None, [G])
        errors.append(total)
    assert errors[2] < 0.9 * errors[1] < 0.8 * errors[0]


def test_chunks_do_not_see_each_other() -> None:
    T, first, second = weights(3), moments(4, 256), moments(5, 256)
    found = quantize_in_blocks(T, [first, second], nearest, num_blocks=2)
    halves = [quantize_in_blocks(T[:256], [first], nearest, num_blocks=2)]
    halves.append(quantize_in_blocks(T[256:], [second], nearest, num_blocks=2))
    assert torch.equal(found.codes, torch.cat([half.codes for half in halves]))
    assert torch.equal(found.scales, torch.cat([half.scales for half in halves]))


def test_chunks_of_other_numbers_of_blocks_go_side_by_side() -> None:
    """Two blocks, one (no factor) and three; every block of all chunks is one call."""
    sizes = (112, 64, 384)
    T, G = weights(3, sum(sizes)), [moments(seed, size) for seed, size in enumerate(sizes)]
    rounded: list[int] = []

    def counted(T: Tensor, scales: Tensor) -> QuantizedWeight:
        assert len(T) == len(scales)
        rounded.append(len(T))
        return nearest(T, scales)

    found = quantize_in_blocks(T, G, counted, num_blocks=3)
    assert rounded == [56 + 64 + 128, 56 + 128, 128]
    alone = [
        quantize_in_blocks(rows, [own], nearest, num_blocks=3) for rows, own in zip(T.split(sizes), G, strict=True)
    ]
    assert torch.equal(found.codes, torch.cat([part.codes for part in alone]))
    assert torch.equal(found.scales, torch.cat([part.scales for part in alone]))


def test_joint_error_is_that_of_the_tokens() -> None:
    g = torch.Generator().manual_seed(6)
    x, xq = (torch.randn(300, COLUMNS, generator=g, dtype=torch.float64) for _ in range(2))
    W, first, second = weights(7, 48), weights(8, 48), weights(9, 48)
    G = [moments(11, 32), moments(12, 16)]
    C, D = xq.T @ xq / len(x), (x - xq).T @ xq / len(x)

    def by_tokens(Q: Tensor) -> float:
        y = x @ W.T - xq @ Q.T
        return float(sum((part @ m * part).sum() for part, m in zip(y.split([32, 16], 1), G, strict=True)) / len(x))

    found = [float(joint_error(Q - W, C, W @ D, G)) for Q in (first, second)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lrpq.quant.row_feedback.IMPROVED_ELEMENTS", 7 * COLUMNS)
        some = [float(joint_error(Q - W, C, W @ D, G)) for Q in (first, second)]
    assert some == pytest.approx(found, rel=1e-9)
    assert found[0] - found[1] == pytest.approx(by_tokens(first) - by_tokens(second), rel=1e-9)


def test_large_layers_are_rounded_as_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Block by block as all at once, and with a sign of life for each block."""
    x, W, G = inputs(0), weights(0).float(), mildly_together(10)
    found, beats = [], []
    for elements in (ROWS * COLUMNS, 0):
        monkeypatch.setattr("lrpq.refine.quantize.AT_ONCE_ELEMENTS", elements)
        steps: list[None] = []
        how = {"strength": 0.0, "outputs": [G], "row_blocks": 8, "polish_rounds": 0, "name": "w"}
        found.append(quantize_refined(W, sums_of(x), CHOICE, on_step=partial(steps.append, None), **how).weight)
        beats.append(len(steps))
    assert (found[0].codes == found[1].codes).double().mean() > 0.999
    assert torch.equal(found[0].scales, found[1].scales)
    assert beats == [9, 9]


@pytest.mark.parametrize("seed", range(6))
def test_rows_together_are_never_worse_than_gptq_on_rows_alone(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(400, COLUMNS, generator=g) @ torch.randn(COLUMNS, COLUMNS, generator=g)
    W = weights(20 + seed, 256).float()
    # at odd seeds gradients of three tokens: little of what they say of the rows holds
    G = moments(30 + seed, 256).float() if seed % 2 == 0 else torch.randn(3, 256, generator=g).T.cov() + 1e-6
    products = SiteProducts(hessian=HessianSum(xx=x.T @ x, weight_sum=float(len(x)), num_tokens=len(x)), shift=None)
    kept = quantize_refined(W, products, CHOICE, strength=0.0, polish_rounds=0, outputs=[G], row_blocks=2, name="w")
    C = x.T @ x / len(x)
    alone = gptq(W, factorize(C), [CHOICE], grid=Grid.SIGNED)[0]
    errors = [joint_error(q.dequantize(torch.float32) - W, C, None, [G]) for q in (kept.weight, alone)]
    assert errors[0] <= errors[1] * (1 + 1e-6)
    assert kept.rows_alone in (0, 1)
    if seed % 2 == 0:
        assert errors[0] < 0.95 * errors[1]
        assert kept.rows_alone == 0


@pytest.mark.parametrize("adds", [False, True])
def test_parts_of_rows_are_quantized_as_in_the_whole(adds: bool) -> None:
    """With D or P, and with rows that make up for each other's errors inside a part: to the bit."""
    g = torch.Generator().manual_seed(3)
    x, lost = (torch.randn(400, COLUMNS, generator=g) @ torch.randn(COLUMNS, COLUMNS, generator=g) for _ in range(2))
    W, G = weights(40, 512).float(), [moments(41 + i, 256).float() for i in range(2)]
    hessian = HessianSum(xx=(x.T @ x).triu(), weight_sum=float(len(x)), num_tokens=len(x))
    D = 0.1 * lost.T @ x
    products = SiteProducts(hessian=hessian, shift=None if adds else D, pull=W @ D if adds else None)

    def refined(rows: slice, outputs: list[Tensor], parts: list[int]) -> Refined:
        of_rows = products if products.pull is None else replace(products, pull=products.pull[rows])
        how = {"strength": 0.5, "polish_rounds": 1, "row_blocks": 2, "name": "w"}
        return quantize_refined(W[rows], of_rows, CHOICE, outputs=outputs, parts=parts, **how)

    whole = refined(slice(0, 512), G, [256, 256])
    halves = [refined(slice(top, top + 256), [G[i]], [256]) for i, top in enumerate((0, 256))]
    assert torch.equal(whole.weight.codes, torch.cat([half.weight.codes for half in halves]))
    assert torch.equal(whole.weight.scales, torch.cat([half.weight.scales for half in halves]))
    assert whole.rejected_rows == sum(half.rejected_rows for half in halves)
    assert whole.rows == 512
    assert whole.rows_alone == sum(half.rows_alone for half in halves)
    with pytest.raises(QuantizationError, match="lie across parts"):
        refined(slice(0, 512), G, [128, 384])


def test_large_layers_are_cut_between_chunks() -> None:
    assert row_parts(8192, 28672) == (slice(0, 4096), slice(4096, 8192))
    assert row_parts(28672, 8192) == (slice(0, 16384), slice(16384, 28672))
    assert row_parts(10000, 8192) == (slice(0, 8192), slice(8192, 10000))
    for d_out, d_in in [(1024, 8192), (4096, 28672), (14336, 4096), (576, 1536)]:
        assert row_parts(d_out, d_in) == (slice(0, d_out),)


def test_sums_of_gradients() -> None:
    g = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    g[7] = 0.0
    total, parts = empty_outputs(6, "cpu"), [empty_outputs(6, "cpu") for _ in range(2)]
    add_outputs(total, g)
    for part, some in zip(parts, g.split(30), strict=True):
        add_outputs(part, some)
    wide = g.double()
    expected = sum(torch.outer(row, row) / row.norm() for row in wide if row.any())
    torch.testing.assert_close(total[0].double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(merge_outputs(*parts)[0], total[0], rtol=1e-5, atol=1e-6)


def test_wide_layers_are_cut_into_chunks() -> None:
    wide = CHUNK_ROWS + 3
    total = empty_outputs(wide, "cpu")
    assert [len(G) for G in total] == [CHUNK_ROWS, 3]
    assert num_chunks(wide) == 2
    g = torch.randn(2, wide, generator=torch.Generator().manual_seed(0))
    add_outputs(total, g)
    norms = g.norm(dim=1)
    torch.testing.assert_close(total[1], sum(torch.outer(r, r) / n for r, n in zip(g[:, -3:], norms, strict=True)))


def test_moments_of_another_layer_are_refused() -> None:
    with pytest.raises(QuantizationError, match=r"layer: 512 rows, scales of 512 and output gradients of 256"):
        quantize_in_blocks(weights(0), [moments(0, 256)], nearest, num_blocks=2)
