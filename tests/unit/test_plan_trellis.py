"""What trellis codes take, as planned, against what the real functions do with small layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.plan import counter
from lrpq.errors import ConfigError
from lrpq.model.layers import Choice
from lrpq.plan import kernels, trellis
from lrpq.plan.machine import trellis_rates
from lrpq.plan.work import Work
from lrpq.quant import column_loop, trellis_loop, wavefront
from lrpq.quant.factor import factorize
from lrpq.quant.gptq import Rows, gptq
from lrpq.quant.grid import Grid
from lrpq.quant.hessian import HessianSum
from lrpq.quant.polish import polish
from lrpq.quant.trellis import WIDTHS, segment_edges
from lrpq.refine import quantize
from lrpq.refine.products import SiteProducts
from lrpq.refine.quantize import quantize_refined
from lrpq.relevance import outputs
from tasks.estimate.machines import known_gpu
from tasks.estimate.trellis_rates import TRELLIS_ASSUMED, TRELLIS_RATES, with_trellis_rates

D_IN = 100
"""Four leaves of columns, and three steps of blocks and a part of one."""
CHOICE = Choice(bits=3, group_size=20, trellis=True)
UNIFORM = replace(CHOICE, trellis=False)
EDGE = 16
"""Rows on either side of a segment's end."""


class Calls:
    """Stands in for ``round_segments``: counts the rows that it would go down, and rounds each column to nothing."""

    def __init__(self, threads: int) -> None:
        self.threads, self.visited, self.dependent = threads, 0, 0

    def __call__(
        self,
        T: Tensor,
        W: Tensor,
        S: Tensor,
        *rest: Any,
        bits: int,
        firsts: Tensor | None = None,
        most_columns: int | None = None,
    ) -> None:
        codes, edges = rest[4], rest[5].tolist()
        begins = [0] * (len(edges) - 1) if firsts is None else firsts.tolist()
        most = len(T) if most_columns is None else most_columns
        segments = [
            (first, end, begin, min(begin + most, len(T)))
            for (first, end), begin in zip(pairwise(edges), begins, strict=True)
            if 0 <= begin < len(T)
        ]
        self.visited += sum((last - begin) * (end - first) for first, end, begin, last in segments)
        num = min(self.threads, len(segments))
        cuts = [len(segments) * i // num for i in range(num + 1)]
        gone = [(last - begin) * (end - first + 2 * min(EDGE, end - first)) for first, end, begin, last in segments]
        self.dependent += max(sum(gone[begin:end]) for begin, end in pairwise(cuts))
        for first, end, begin, last in segments:
            T[begin:last, first:end] = W[begin:last, first:end]
            codes[begin:last, first:end] = 0


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Calls:
    found = Calls(request.param)
    monkeypatch.setattr(trellis_loop, "round_segments", found)
    monkeypatch.setattr(wavefront, "round_segments", found)
    return found


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hessian(d: int, seed: int = 0) -> Tensor:
    X = numbers(4 * d, d, seed=seed)
    return X.T @ X / len(X)


def counted(action: Callable[[], object]) -> int:
    """FLOPs of all products."""
    with counter() as counting:
        action()
    return sum(counting.counts.values())


def steps(work: Work) -> float:
    return work.amounts[f"{trellis.STEPS}:{CHOICE.bits}"]


@pytest.mark.parametrize("parts", [[64], [128, 128], [300, 300], [100, 160]])
def test_gptq_goes_down_as_many_rows_and_multiplies_as_much(calls: Calls, parts: list[int]) -> None:
    W, factor = numbers(sum(parts), D_IN, seed=1), factorize(hessian(D_IN))
    flops = counted(lambda: gptq(W, factor, [CHOICE], rows=Rows(parts=parts)))
    planned = kernels.quantize(len(W), D_IN, [CHOICE], kind=Grid.SIGNED, cpu=True, parts=parts, threads=calls.threads)
    assert calls.visited == D_IN * len(W)
    assert steps(planned) == calls.dependent
    assert planned.flops == flops > 0
    assert not planned.amounts.keys() & {"search", "columns", "column-steps"}


def test_other_choices_are_counted_beside_it() -> None:
    each = [kernels.quantize(128, D_IN, [choice], kind=Grid.SIGNED, cpu=True) for choice in (UNIFORM, CHOICE)]
    both = kernels.quantize(128, D_IN, [UNIFORM, CHOICE], kind=Grid.SIGNED, cpu=True)
    assert both.amounts == (each[0] + each[1]).amounts


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_polish_is_one_sweep_a_round_and_a_refit_more(calls: Calls, rounds: int) -> None:
    W, H = numbers(300, D_IN, seed=2), hessian(D_IN)
    before = gptq(W, factorize(H), [CHOICE])
    calls.visited = calls.dependent = 0
    flops = counted(lambda: polish(W, before, H, rounds=rounds))
    planned = kernels.polish(300, D_IN, CHOICE, rounds=rounds, sweeps=2, cpu=True, threads=calls.threads)
    assert calls.visited == rounds * D_IN * 300
    assert steps(planned) == calls.dependent
    assert flops * 0.98 <= planned.flops <= flops * 1.1  # sums over groups are counted with those around them


@pytest.mark.parametrize("corrected", [False, True], ids=["plain", "corrected"])
@pytest.mark.parametrize("row_blocks", [1, 2, 12])
@pytest.mark.parametrize("rows", [300, 640])
def test_refined_layers(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, corrected: bool, row_blocks: int, rows: int
) -> None:
    """Chunks of 512 outputs: of 640 rows, blocks of two chunks are rounded at once. That rows on their own are better
    is not planned for."""
    monkeypatch.setattr(quantize, "_share", lambda _: 1e6)
    monkeypatch.setattr(outputs, "CHUNK_ROWS", 512)
    monkeypatch.setattr(kernels, "CHUNK_ROWS", 512)
    W, H = numbers(rows, D_IN, seed=3), hessian(D_IN)
    products = SiteProducts(
        hessian=HessianSum(xx=512 * H, weight_sum=512.0, num_tokens=512),
        shift=0.01 * hessian(D_IN, seed=4) if corrected else None,
    )
    gradients = [hessian(own, seed=5) for own in kernels.output_chunks(rows)]

    def refine() -> None:
        quantize_refined(
            W, products, CHOICE, strength=0.5 if corrected else 0.0, outputs=gradients, row_blocks=row_blocks, name="w"
        )

    flops = counted(refine)
    how = kernels.Refinement(
        corrected=corrected,
        polish_rounds=2,
        polish_sweeps=2,
        row_blocks=row_blocks,
        kind=Grid.SIGNED,
        cpu=True,
        threads=calls.threads,
    )
    planned = kernels.quantize_refined(rows, D_IN, CHOICE, how, pulled=False)
    # in blocks, for which uniform codes stand in before, or plain and corrected; then one polish
    assert calls.visited == D_IN * rows * (1 + (corrected and row_blocks == 1) + 1)
    assert steps(planned) == calls.dependent
    assert flops * 0.98 <= planned.flops <= flops * 1.1


def test_parts_of_a_layer_are_rounded_one_after_the_other() -> None:
    how = kernels.Refinement(
        corrected=True, polish_rounds=2, polish_sweeps=2, row_blocks=12, kind=Grid.SIGNED, cpu=False
    )
    choice = replace(CHOICE, group_size=64)
    whole, parts = (
        kernels.quantize_refined(8192, 8192, choice, how, pulled=False, parts=parts) for parts in (None, [4096, 4096])
    )
    assert steps(parts) > 1.2 * steps(whole)
    assert parts.flops == pytest.approx(whole.flops)


def test_a_gpu_goes_down_segments_side_by_side() -> None:
    def of(rows: int) -> float:
        return steps(trellis.round_segments([rows], 10, CHOICE.bits, cpu=False))

    at_once = 128 * trellis.SEGMENTS_AT_ONCE
    assert of(128) == of(at_once) == 10 * (128 + 2 * EDGE)
    assert of(at_once + 16) == 2 * of(at_once)
    assert of(64) == 10 * (64 + 2 * EDGE)


@pytest.mark.parametrize("parts", [[128], [300, 17], [640, 128, 16]])
def test_segments_are_those_of_the_codes(parts: list[int]) -> None:
    edges = segment_edges(parts)
    assert trellis.segments_of(parts) == (edges[1:] - edges[:-1]).tolist()


def test_leaves_of_columns_are_those_of_the_sweep() -> None:
    leaf = trellis_loop.LEAF_COLUMNS["cpu"]
    rounded = [last - first for first, middle, last in column_loop.halvings(0, D_IN, leaf) if middle == last]
    assert sum(rounded) == D_IN
    assert len(rounded) > 2


def test_decoding_takes_more_the_fewer_bits() -> None:
    taken = [kernels.dequantize(128, D_IN, itemsize=4, choice=replace(CHOICE, bits=b)).amounts["wide"] for b in WIDTHS]
    assert taken == sorted(taken, reverse=True)
    assert min(taken) > kernels.dequantize(128, D_IN, itemsize=4, choice=UNIFORM).amounts["wide"]
    assert kernels.dequantize(8, 8, itemsize=2) == kernels.dequantize(8, 8, itemsize=2, choice=UNIFORM)


# rates


def test_this_machine_has_a_rate_of_every_width() -> None:
    found = trellis_rates(torch.device("cpu"))
    assert found.keys() == TRELLIS_RATES.keys() == {f"{trellis.STEPS}:{bits}" for bits in WIDTHS}
    assert all(1e4 < rate < 1e9 for rate in found.values()), found


def test_gpus_without_rates_have_assumed_ones_that_are_named() -> None:
    known = known_gpu("h100")
    found = with_trellis_rates(known)
    assert found.assumed == (*known.assumed, TRELLIS_ASSUMED)
    assert found.rates == {**known.rates, **TRELLIS_RATES}
    assert with_trellis_rates(found) == found
    own = {f"{trellis.STEPS}:3": 1.0}
    assert with_trellis_rates(replace(known, rates={**known.rates, **own})).rates[f"{trellis.STEPS}:3"] == 1.0


def test_a_cpu_without_rates_is_to_be_measured_again() -> None:
    measured = replace(known_gpu("h100"), device="cpu", name="old")
    with pytest.raises(ConfigError, match=r"machine old: .*lrpq plan --calibrate"):
        with_trellis_rates(measured)
    assert with_trellis_rates(replace(measured, rates=TRELLIS_RATES)).assumed == measured.assumed
