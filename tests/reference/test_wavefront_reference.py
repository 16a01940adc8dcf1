"""Blocks of rows with trellis codes side by side, against explicit inverses column by column, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from trellis_case import CHOICE, columns_of, hessian, numbers, rounded

from lrpq.errors import QuantizationError
from lrpq.kernels.trellis import round_segments
from lrpq.quant import wavefront
from lrpq.quant.factor import factorize
from lrpq.quant.gptq import Rounding, Rows
from lrpq.quant.grid import Grid, QuantizedWeight
from lrpq.quant.row_feedback import RowBlocks
from lrpq.quant.trellis import SEGMENT_ROWS, codebook, segment_edges
from lrpq.quant.wavefront import Blocks

D_IN = 48
CHUNKS = (256, 300)
"""Two blocks, and two with a third of 44 rows."""
DAMPING = 0.2


def moments(rows: int, seed: int) -> Tensor:
    """Second moments of gradients that share 20 directions."""
    shared = numbers(4 * rows, 20, seed=seed) @ numbers(20, rows, seed=seed + 1) / 20**0.5
    together = shared + 0.5 * numbers(4 * rows, rows, seed=seed + 2)
    G: Tensor = together.T @ together / len(together)
    return G


def rounded_in_blocks(
    T: Tensor, H: Tensor, outputs: list[Tensor], scales: Tensor, steps: list[None] | None = None
) -> QuantizedWeight:
    rounding = Rounding(factorize(H), [CHOICE])
    blocks = RowBlocks(T, scales, outputs, num_blocks=8, damping=DAMPING, together=SEGMENT_ROWS)
    count = (lambda: None) if steps is None else (lambda: steps.append(None))
    blocks.round_at_once(lambda T, S, weights, cuts: rounding.in_blocks(T, S, weights, cuts, on_step=count))
    found = blocks.weight()
    assert torch.equal(found.scales, scales)
    return found


def scales_of(T: Tensor, H: Tensor) -> Tensor:
    (found,) = Rounding(factorize(H), [CHOICE])(T, rows=Rows(parts=[len(T)]))
    return found.scales


@pytest.mark.parametrize("width", [7, 16, 48])
def test_each_column_of_a_block_sees_all_errors_before_it(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """Those of its own rows in the columns before, and of the blocks before in its own column, and no others: targets
    by the inverse of G and the factor of H, in float64, from the codes that were found."""
    monkeypatch.setitem(wavefront.COLUMNS, "cpu", width)
    T, H, steps = numbers(sum(CHUNKS), D_IN, seed=1), hessian(D_IN, seed=2), []
    outputs = [moments(rows, seed) for rows, seed in zip(CHUNKS, (4, 7), strict=True)]
    found = rounded_in_blocks(T, H, outputs, scales_of(T, H), steps)
    assert 3 <= len(steps) <= 5

    factor, start = factorize(H), 0
    R = factor.R.double()
    t, q, S, codes = columns_of(T, found, factor.order)
    for G in outputs:
        damped = (G + DAMPING * G.diagonal().mean() * torch.eye(len(G))).double()
        lost = (t - q)[:, start : start + len(G)]
        for top in range(0, len(G), SEGMENT_ROWS):
            own, left = slice(top, min(top + SEGMENT_ROWS, len(G))), slice(top, None)
            # G_LL E_L = - G_LA E_A: the best errors of the rows that are left
            best = -torch.linalg.solve(damped[left, left], damped[left, :top] @ lost[:, :top].T)
            rows = slice(start + own.start, start + own.stop)
            wanted = t[:, rows] - best[: own.stop - top].T
            targets = wanted + (R.triu(1) / R.diagonal()).T @ (wanted - q[:, rows])
            weights = damped.diagonal()[own].float()
            expected, _ = rounded(targets.float(), CHOICE.bits, S=S[:, rows].float(), weights=weights)
            assert (expected == codes[:, rows]).double().mean() > 0.99
        start += len(G)


def test_rows_that_do_not_work_together_are_rounded_as_ever() -> None:
    T, H = numbers(300, D_IN, seed=1), hessian(D_IN, seed=2)
    weights = numbers(300, seed=3).abs() + 0.1
    scales = scales_of(T, H)
    found = rounded_in_blocks(T, H, [torch.diag(weights)], scales)
    damped = weights + DAMPING * weights.mean()
    (alone,) = Rounding(factorize(H), [CHOICE])(T, [scales], Rows(parts=[300], weights=damped))
    assert (found.codes == alone.codes).double().mean() > 0.99


def test_chunks_do_not_see_each_other() -> None:
    T, H = numbers(sum(CHUNKS), D_IN, seed=1), hessian(D_IN, seed=2)
    outputs = [moments(rows, seed) for rows, seed in zip(CHUNKS, (4, 7), strict=True)]
    scales = scales_of(T, H)
    found = rounded_in_blocks(T, H, outputs, scales)
    parts = zip(T.split(CHUNKS), outputs, scales.split(CHUNKS), strict=True)
    alone = [rounded_in_blocks(own, H, [G], S).codes for own, G, S in parts]
    assert torch.equal(found.codes, torch.cat(alone))


@pytest.mark.parametrize("blocks", [1, 3, 8])
def test_blocks_of_a_uniform_grid_are_those_that_are_rounded_one_by_one(blocks: int) -> None:
    """In float64 to the last code: targets made anew for every block, by another product."""
    choice = replace(CHOICE, trellis=False)
    T, H = numbers(sum(CHUNKS), D_IN, seed=1).double(), hessian(D_IN, seed=2).double()
    outputs = [moments(rows, seed).double() for rows, seed in zip(CHUNKS, (4, 7), strict=True)]
    rounding = Rounding(factorize(H), [choice], grid=Grid.SIGNED)
    scales = rounding(T)[0].scales
    found = []
    for at_once in (True, False):
        rows = RowBlocks(T, scales, outputs, num_blocks=blocks, damping=DAMPING)
        if at_once:
            rows.round_at_once(rounding.in_blocks)
        else:
            rows.round(lambda T, S: rounding(T, [S])[0])
        found.append(rows.weight())
    assert torch.equal(found[0].codes, found[1].codes)
    assert torch.equal(found[0].scales, found[1].scales)
    assert (found[0].codes == rounding(T)[0].codes).all() == (blocks == 1)


def test_targets_that_overflow_are_refused() -> None:
    """Errors of the first block that the second one cannot make up for: its targets end beyond float32."""
    T, H = numbers(256, D_IN, seed=1), hessian(D_IN, seed=2)
    scales = scales_of(T, H)
    rounding = Rounding(factorize(H), [CHOICE], name="a.b")
    blocks = [Blocks(sizes=[128, 128], pull=torch.full((256, 256), 1e38))]
    with pytest.raises(QuantizationError, match=r"a\.b: "):
        rounding.in_blocks(T, scales, None, blocks)


def test_segments_with_no_columns_are_left_alone() -> None:
    T, codes = numbers(3, 150, seed=1), torch.full((3, 150), 99, dtype=torch.int8)
    before, ones, runs = T.clone(), torch.ones(1, 150), torch.zeros(3, dtype=torch.int64)
    edges, firsts = segment_edges([150]), torch.tensor([-2, 3], dtype=torch.int32)
    round_segments(T, T, ones, torch.eye(3), ones[0], runs, codebook(3), codes, edges, bits=3, firsts=firsts)
    assert torch.equal(T, before)
    assert (codes == 99).all()
