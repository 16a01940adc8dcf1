"""Trellis codes of a GPU against those of a CPU: segments of some columns, and whole layers whose blocks of rows move
each other's targets. All of it needs a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from trellis_case import hessian, numbers

from lrpq.kernels.trellis import round_segments
from lrpq.model.layers import Choice
from lrpq.quant import trellis_loop
from lrpq.quant.factor import factorize
from lrpq.quant.gptq import Rounding, Rows, gptq
from lrpq.quant.grid import QuantizedWeight
from lrpq.quant.polish import polish
from lrpq.quant.trellis import WIDTHS, codebook, segment_edges
from lrpq.quant.wavefront import Blocks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("firsts", [[0, 0], [1, 0], [-2, 1], [2, 3]])
def test_the_streams_of_a_gpu_are_those_of_a_cpu(firsts: list[int], bits: int) -> None:
    """Nearly all symbols, whole segments and a short one at columns of their own, errors fed back, nothing else
    written; and errors as good where some differ."""
    columns, rows = 3, 150
    W, R = numbers(columns, rows, seed=1), 0.2 * numbers(columns, columns, seed=2)
    S, weights = numbers(1, rows, seed=3).abs() + 0.5, numbers(rows, seed=4).abs() + 0.1
    runs, codes = torch.zeros(columns, dtype=torch.int64), torch.full((columns, rows), 99, dtype=torch.int8)
    begins = torch.tensor(firsts, dtype=torch.int32)
    given = W.clone(), W, S, R, weights, runs, codebook(bits), codes, segment_edges([rows]), begins
    there = [x.to("cuda", copy=True) for x in given]
    most = columns if firsts == [0, 0] else 2
    for *parts, begin in (given, there):
        round_segments(*parts, firsts=None if most == columns else begin, most_columns=most, bits=bits)
    written = torch.zeros(columns, rows, dtype=torch.bool)
    for rows_of, begin in zip((slice(0, 128), slice(128, rows)), firsts, strict=True):
        written[max(begin, 0) if begin >= 0 else columns : begin + most, rows_of] = True
    assert torch.equal(codes != 99, written)
    assert torch.equal(there[7].cpu() != 99, written)
    assert torch.equal(there[0].cpu()[~written], W[~written])
    assert (there[7].cpu() == codes).double().mean() > 0.98
    torch.testing.assert_close(there[0].cpu().square().mean(), given[0].square().mean(), rtol=0.01, atol=0)


def moved(rows: int, seed: int, sizes: list[int]) -> Tensor:
    """Half of what comes before a block in another place, by random directions: strictly below its blocks."""
    pull = numbers(rows, rows, seed=seed) / rows**0.5
    block = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    found: Tensor = torch.where(block[:, None] > block[None, :], 0.5 * pull, 0.0)
    return found


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("one_launch", [True, False])
@pytest.mark.parametrize(
    "sizes", [[[128] * 4 + [40]], [[256, 256], [128, 16]], [[300]]], ids=["blocks", "chunks", "alone"]
)
@pytest.mark.parametrize("d_in", [96, 90])
def test_blocks_of_a_gpu_are_those_of_a_cpu(
    sizes: list[list[int]], d_in: int, one_launch: bool, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one launch, and some columns after the other, the last ones no whole leaf too: nearly all codes, and a loss as
    low."""
    monkeypatch.setattr(trellis_loop, "MOST_COLUMNS", 2048 if one_launch else 0)
    rows = sum(map(sum, sizes))
    choice = Choice(bits=bits, group_size=d_in // 3, scale_bits=16, trellis=True)
    W, H = 0.1 * numbers(rows, d_in, seed=1), hessian(d_in, seed=2)
    weights = numbers(rows, seed=3).abs() + 0.1
    chunks = [
        Blocks(sizes=own, pull=None if len(own) == 1 else moved(sum(own), seed, own)) for seed, own in enumerate(sizes)
    ]
    (plain,) = gptq(W, factorize(H), [choice], rows=Rows(parts=[rows], weights=weights))
    found = {
        device: Rounding(factorize(H.to(device)), [choice]).in_blocks(
            W.to(device),
            plain.scales.to(device),
            weights.to(device),
            [Blocks(sizes=c.sizes, pull=None if c.pull is None else c.pull.to(device)) for c in chunks],
        )
        for device in ("cpu", "cuda")
    }
    same = (found["cuda"].codes.cpu() == found["cpu"].codes).double().mean()
    assert same > (0.98 if bits < 5 else 0.9)  # a target in a last digit further on is another code
    ours, theirs = (off(W, found[device], H, chunks) for device in ("cuda", "cpu"))
    assert ours == pytest.approx(theirs, rel=0.01)
    if any(c.pull is not None for c in chunks):
        assert ours < 0.98 * off(W, plain, H, chunks)


def off(W: Tensor, found: QuantizedWeight, H: Tensor, chunks: list[Blocks]) -> float:
    """Loss of what rows should have become once the earlier ones were rounded."""
    lost, start = W - found.dequantize(torch.float32).cpu(), 0
    total = 0.0
    for chunk in chunks:
        own = lost[start : start + sum(chunk.sizes)].double()
        short = own if chunk.pull is None else own + chunk.pull.double() @ own
        total += float((short @ H.double() * short).sum())
        start += len(own)
    return total


@pytest.mark.parametrize("one_launch", [True, False])
def test_polished_streams_of_a_gpu_are_those_of_a_cpu(one_launch: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trellis_loop, "MOST_COLUMNS", 2048 if one_launch else 0)
    choice = Choice(bits=3, group_size=32, scale_bits=16, trellis=True)
    W, H = 0.1 * numbers(300, 96, seed=1), hessian(96, seed=2)
    (plain,) = gptq(W, factorize(H), [choice])
    found = {}
    for device in ("cpu", "cuda"):
        given = QuantizedWeight(codes=plain.codes.to(device), scales=plain.scales.to(device), choice=choice)
        found[device] = polish(W.to(device), [given], H.to(device))[0].weight
    assert (found["cuda"].codes.cpu() == found["cpu"].codes).double().mean() > 0.95
    lost = [float((x @ H * x).sum()) for x in (W - q.dequantize(torch.float32).cpu() for q in found.values())]
    assert lost[1] == pytest.approx(lost[0], rel=0.01)


def test_more_segments_than_a_gpu_runs_at_once_repeat_bit_for_bit() -> None:
    """Thirteen blocks in each of 60 chunks: more than wait at once, and the same whichever came first."""
    sizes, d_in = [128] * 13, 40
    rows = sum(sizes) * 60
    W, H = 0.1 * numbers(rows, d_in, seed=1).cuda(), hessian(d_in, seed=2).cuda()
    choice = Choice(bits=3, group_size=20, scale_bits=16, trellis=True)
    rounding = Rounding(factorize(H), [choice])
    chunks = [Blocks(sizes=sizes, pull=moved(sum(sizes), 5, sizes).cuda())] * 60
    scales = rounding.scales(W)[0]
    assert trellis_loop.at_once(d_in, rows)
    first = rounding.in_blocks(W, scales, None, chunks).codes
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        again = rounding.in_blocks(W, scales, None, chunks).codes
    torch.cuda.synchronize()
    assert torch.equal(first, again)
    one = rounding.in_blocks(W[: sum(sizes)], scales[: sum(sizes)], None, chunks[:1]).codes
    assert (first[: sum(sizes)] == one).all()
