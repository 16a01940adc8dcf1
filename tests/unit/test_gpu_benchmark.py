"""What benchmarks/gpu counts, splits and times: its own arithmetic, on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu import blocks, flops, layers, pipeline, timers, whole
from benchmarks.gpu.growth import slope
from benchmarks.gpu.matrices import hessian, weights
from benchmarks.gpu.model import RandomSource, random_tokens
from benchmarks.gpu.products import PRODUCTS, as_tf32
from benchmarks.gpu.quantizer import WIDTHS
from benchmarks.gpu.reference import paper_gptq, total_loss
from benchmarks.gpu.report import Report, Row
from benchmarks.gpu.shapes import TINY, BlockShape
from benchmarks.gpu.stages import Run, StageTimes, run_profile, run_refine
from lrpq.model.layers import Choice
from lrpq.quant.factor import factorize
from lrpq.quant.gptq import gptq
from lrpq.quant.grid import Grid
from lrpq.quant.hessian import accumulate, empty_hessian
from lrpq.quant.rtn import round_to_nearest
from lrpq.relevance.outputs import add_outputs, empty_outputs
from lrpq.relevance.passes import rules_for, run_passes
from lrpq.relevance.rules import Pass, PassSwitch

CPU = torch.device("cpu")
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]
SHAPE = TINY["70B"]
WINDOWS, LENGTH = 4, 24


class _NoModules:
    """Instead of the counter's own tracker, whose hooks on modules do not go with gradients of inputs alone."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def _added_product(total: torch.Size, a: torch.Size, b: torch.Size, **_: object) -> int:
    return 2 * a[0] * a[1] * b[1]


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """FLOPs of products, those added in place too; attention written out: the counter knows not every fused kernel."""
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _added_product})
    counter.mod_tracker = _NoModules()
    with counter, sdpa_kernel(SDPBackend.MATH):
        yield counter


def by_operation(counter: FlopCounterMode) -> tuple[float, float]:
    """(products of matrices, batched products: attention's)."""
    found = {str(op): float(n) for op, n in counter.get_flop_counts()["Global"].items()}
    batched = sum(n for op, n in found.items() if "bmm" in op)
    return sum(found.values()) - batched, batched


def tiny_run() -> Run:
    source = RandomSource(SHAPE, layers=1, length=LENGTH, device=CPU)
    return Run(source=source, tokens=random_tokens(WINDOWS, LENGTH), device=CPU, shards=2, micro_batch=2)


def test_a_blocks_passes_take_the_flops_that_are_counted_as_necessary() -> None:
    """Written-out attention multiplies all L^2 pairs where (L + 1) L / 2 are causal."""
    stream = tiny_run().stream()
    expected = flops.block_flops(SHAPE, windows=WINDOWS, length=LENGTH)
    all_pairs = 2 * LENGTH / (LENGTH + 1)
    hidden = stream.embed(random_tokens(WINDOWS, LENGTH))
    switch, passes = PassSwitch(), (Pass.FISHER, Pass.LRP)
    with stream.block(0) as module:
        with counting() as counter, torch.no_grad():
            stream.run(module, 0, hidden)
        assert by_operation(counter) == pytest.approx((expected.linear, expected.attention * all_pairs))
        with rules_for(module, switch, passes), torch.enable_grad(), counting():
            leaf = hidden.detach().requires_grad_()
            output = stream.run(module, 0, leaf)
        with counting() as counter:
            run_passes(output, leaf, {each: torch.ones_like(output) for each in passes}, switch)
        assert by_operation(counter) == pytest.approx((2 * expected.linear, 4 * expected.attention * all_pairs))
        assert expected.backward(2) == 2 * expected.linear + 4 * expected.attention


def test_weights_and_widths_are_those_of_the_model() -> None:
    stream = tiny_run().stream()
    specs = stream.block_specs(0)
    assert [(s.d_out, s.d_in) for s in specs] == list(SHAPE.layers.values())
    assert {k: len(v) for k, v in stream.sites(0).items()} == {k: len(v) for k, v in SHAPE.sites.items()}
    assert flops.num_weights(SHAPE) == sum(spec.num_weights for spec in specs)


@pytest.mark.parametrize(
    ("do", "necessary"),
    [
        (lambda X: accumulate(empty_hessian(X.shape[1]), X, torch.ones(len(X))), flops.hessian(64, 40)),
        (lambda X: add_outputs(empty_outputs(X.shape[1], "cpu"), X), flops.moments(64, 40)),
    ],
)
def test_symmetric_sums_need_one_triangle(do: Callable[[Tensor], object], necessary: float) -> None:
    """What is performed is between one triangle and the square."""
    X = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    pairs = sum(1 for i in range(64) for j in range(64) if j >= i)
    assert necessary == 2 * 40 * pairs
    with counting() as counter:
        do(X)
    assert necessary <= counter.get_total_flops() <= 2 * 40 * 64 * 64


@pytest.mark.parametrize(("stage", "name"), [(run_profile, "profile"), (run_refine, "refine")])
def test_no_stage_does_with_fewer_flops_than_are_necessary(stage: Callable[[Run], object], name: str) -> None:
    """Of the whole sweep but the head; what is performed beyond the necessary is a fifth, at these sizes."""
    expected = flops.block_flops(SHAPE, windows=WINDOWS, length=LENGTH)
    with counting() as counter:
        stage(tiny_run())
    # the head of the tiny model is as wide as its blocks, and not theirs
    head = 4.0 * WINDOWS * LENGTH * SHAPE.hidden * 512 + 2.0 * WINDOWS * LENGTH * (2 * 2 + 256 * 256)
    performed = counter.get_total_flops() - (head if name == "profile" else 0)
    assert getattr(expected, name) <= performed <= 1.25 * getattr(expected, name)


def test_the_column_loop_needs_each_pair_of_columns_once() -> None:
    W, H = weights(12, 64, seed=1, device=CPU).double(), hessian(64, seed=2, device=CPU).double()
    choice = Choice(bits=4, group_size=32)
    factor = factorize(H)
    q = gptq(W, factor, [choice], grid=Grid.SIGNED)[0]
    with counting() as counter:
        Q = paper_gptq(W, H, q.scales, choice, damping=factor.damping, order=factor.order, block=16)
    assert counter.get_total_flops() == flops.column_loop(12, 64)
    # and the two are the same algorithm: by R here, by explicit inverses there
    assert torch.allclose(Q, q.dequantize(torch.float64), rtol=1e-9)
    nearest = (W.view(12, 2, 32) / q.scales.double().unsqueeze(-1)).round().clamp(-8, 7) * q.scales.double().unsqueeze(
        -1
    )
    assert total_loss(W, Q, H) < 0.7 * total_loss(W, nearest.view(12, 64), H)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "bits"), [("fp32", 20), ("tf32", 9), ("tf32x3", 19), ("bf16", 6), ("bf16x3", 14), ("bf16x6", 20)]
)
def test_split_products_keep_the_bits_that_their_parts_have(name: str, bits: int, device: str) -> None:
    g = torch.Generator().manual_seed(3)
    a, b = torch.randn(48, 40, generator=g), torch.randn(48, 56, generator=g)
    product = PRODUCTS[name]
    before = torch.backends.cuda.matmul.fp32_precision
    total = torch.ones(40, 56, device=device)
    product.add(total, product.split(a.to(device)), product.split(b.to(device)))
    assert torch.backends.cuda.matmul.fp32_precision == before
    error = (total.cpu().double() - 1 - a.double().T @ b.double()).abs().amax()
    size = float((a.double().abs().T @ b.double().abs()).amax())
    assert error < size * 2.0**-bits
    if product.narrow is not None and name != "bf16x6":  # six products reach float32's own rounding
        assert error > size * 2.0 ** -(bits + 8)


@pytest.mark.parametrize("device", DEVICES)
def test_codes_of_float32_lose_less_than_a_thousandth_to_float64(device: str) -> None:
    """At every width, on inputs with outliers and two tokens a channel; rounding to nearest loses far more."""
    W, H = (make.to(device) for make in (weights(1024, 256, seed=5, device=CPU), hessian(256, seed=6, device=CPU)))
    factor = factorize(H)
    choices = [Choice(bits=bits, group_size=64) for bits in WIDTHS]
    for q in gptq(W, factor, choices, grid=Grid.SIGNED):
        order, damping = factor.order, factor.damping
        Q = paper_gptq(W.double(), H.double(), q.scales, q.choice, damping=damping, order=order)
        exact = total_loss(W, Q, H.double())
        assert total_loss(W, q.dequantize(), H.double()) == pytest.approx(exact, rel=1e-3)
        nearest = round_to_nearest(W, q.choice, grid=Grid.SIGNED)
        assert exact < 0.8 * total_loss(W, nearest.dequantize(), H.double())


def test_tf32_rounds_to_the_nearest_of_eleven_bits_ties_to_even() -> None:
    x = torch.cat(
        [torch.randn(200, generator=torch.Generator().manual_seed(4)), torch.tensor([1 + 2.0**-11, 1 + 3 * 2.0**-11])]
    )
    mantissa, exponent = torch.frexp(x.double())
    expected = torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)
    assert torch.equal(as_tf32(x).double(), expected)


def test_timers_give_a_call_the_time_that_calls_inside_it_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    def inner() -> None:
        time.sleep(0.02)

    def outer() -> None:
        blocks.inner()  # type: ignore[attr-defined]
        time.sleep(0.01)

    monkeypatch.setattr(blocks, "inner", inner, raising=False)
    monkeypatch.setattr(blocks, "outer", outer, raising=False)
    names = {"inside": "benchmarks.gpu.blocks:inner", "around": "benchmarks.gpu.blocks:outer", "none": "lrpq.quant:no"}
    watch = timers.Timers(CPU, names)
    with watch.watching():
        blocks.outer()  # type: ignore[attr-defined]
    assert watch.seconds["inside"] >= 0.02
    assert watch.seconds["around"] >= 0.01
    assert watch.calls == {"inside": 1, "around": 1}
    assert watch.absent == ["lrpq.quant:no"]
    assert blocks.outer is outer  # type: ignore[attr-defined]


def test_a_failed_part_is_a_failed_row_and_the_whole_model_needs_all_stages(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    report = Report(CPU, path)
    report.attempt("gptq", "this part", partial(int, "x"))
    report.add(Row(part="block", name="70B profile, one block", seconds=2.0, blocks=80))
    whole.add_total(report, SHAPE)
    assert [bool(row.error) for row in report.rows] == [True, False, True]
    assert report.rows[0].error.startswith("ValueError: invalid literal")
    assert report.rows[2].error == "not measured: candidates, refine, quantize"
    later = Report(CPU, None, (path,))
    for stage in ("candidates", "refine", "quantize"):
        later.add(Row(part=stage, name=f"70B {stage}, one block", seconds=1.0, blocks=80))
    whole.add_total(later, SHAPE)
    assert not later.failed
    assert later.rows[-1].seconds == 80 * 5.0


def test_a_block_too_large_for_the_card_is_measured_on_fewer_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each size that did not fit is a failed row, and what was measured does not count for the whole model."""

    def small_card(run: Run) -> StageTimes:
        if len(run.tokens) > 8:
            raise torch.OutOfMemoryError("too large. Really")
        return run_refine(run)

    monkeypatch.setattr(blocks, "STAGES", {"refine": small_card})
    report = Report(CPU)
    windows = blocks.Windows(windows=16, length=LENGTH, shards=2, micro_batch=2)
    blocks.measure_blocks(report, CPU, [SHAPE], windows, with_breakdown=False)
    failed, found = report.rows
    assert (failed.name, failed.error) == ("70B refine, one block, 16 windows", "too large")
    assert (found.name, found.blocks) == ("70B refine, one block, 8 windows", 0)
    assert found.flops == flops.block_flops(SHAPE, windows=8, length=LENGTH).refine
    assert report.failed


@pytest.mark.parametrize("names", [blocks.STAGE_FUNCTIONS, layers.FUNCTIONS, pipeline.PIPELINE_FUNCTIONS])
def test_functions_that_are_timed_exist(names: dict[str, str]) -> None:
    """Else their time would be in a row that says something else."""
    watch = timers.Timers(CPU, names)
    with watch.watching():
        pass
    assert watch.absent == []


def test_exponents_are_those_of_a_power_law() -> None:
    x = [1.0, 2.0, 3.0]
    assert slope(x, [1.0 + 2.5 * each for each in x]) == pytest.approx(2.5)


def test_a_70b_block_has_the_published_size() -> None:
    """Llama 3 70B: 80 blocks of 8192 wide layers, 68.5e9 of its 70.6e9 weights."""
    shape = BlockShape(name="70B", hidden=8192, ffn=28672, heads=64, kv_heads=8, blocks=80)
    assert flops.num_weights(shape) * shape.blocks == pytest.approx(68.45e9, rel=1e-3)
    counted = partial(flops.block_flops, shape, length=2048)
    assert counted(windows=128).forward == pytest.approx(128 * counted(windows=1).forward)
