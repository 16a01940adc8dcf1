"""GPTQ on the matrices of a 70B block: factorisation, scale search, column loop, cost; one width and six."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu import flops, matrices
from benchmarks.gpu.measure import measured, release
from benchmarks.gpu.precision import sweep
from benchmarks.gpu.products import PRODUCTS
from benchmarks.gpu.reference import paper_gptq, total_loss
from benchmarks.gpu.report import Report, Row
from lrpq.model.layers import Choice
from lrpq.plan.kernels import search_trials
from lrpq.quant.factor import Factor, factorize
from lrpq.quant.gptq import gptq, predicted_cost
from lrpq.quant.grid import Grid
from lrpq.quant.importance import search_importance
from lrpq.quant.rtn import round_to_nearest
from lrpq.quant.scale_search import search_scales_transposed

PART = "gptq"
WIDTHS = (2, 3, 4, 5, 6, 8)
ONE_WIDTH = 4
GRID = Grid.SIGNED
REPEATS = 3
REFERENCE_ROWS = 256
"""Rows that also go through the float64 reference; rows do not interact."""
_F32 = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One matrix with its Hessian and what the quantizer made of it."""

    name: str
    W: Tensor
    H: Tensor
    factor: Factor
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.W.shape[0], self.W.shape[1]


def matrices_of(*, tiny: bool) -> list[tuple[int, int]]:
    """[d_out, d_in] of the layers; those of one width follow each other and share a Hessian."""
    return [(64, 64), (192, 64), (64, 192)] if tiny else [(8192, 8192), (28672, 8192), (8192, 28672)]


def measure_quantizer(
    report: Report, device: torch.device, shapes: list[tuple[int, int]], *, group_size: int, with_precision: bool
) -> None:
    """Print every step of every matrix, its loss, and what other precisions of the updates add to it."""
    H: Tensor | None = None
    for number, (d_out, d_in) in enumerate(shapes):
        if H is None or len(H) != d_in:
            H = None
            release(device)
            H = matrices.hessian(d_in, seed=1, device=device)
        W = matrices.weights(d_out, d_in, seed=100 + number, device=device)
        name = f"{d_out}x{d_in}"
        factor = _factorization(report, H, name, device)
        layer = Layer(name=name, W=W, H=H, factor=factor, group_size=group_size)
        one = _steps(report, layer, (ONE_WIDTH,), device)
        six = _steps(report, layer, WIDTHS, device)
        report.add(Row(part=PART, name=f"{name}: six widths against one", figures={"times": six / one}))
        release(device)
        _loss(report, layer, device)
        if with_precision:
            _precision(report, layer, device)
        del W, factor, layer
        release(device)


def _factorization(report: Report, H: Tensor, name: str, device: torch.device) -> Factor:
    found = measured(lambda: factorize(H), device, repeats=REPEATS)
    d = len(H)
    report.add(
        Row(
            part=PART,
            name=f"{name}: factorisation",
            seconds=found.seconds,
            flops=flops.cholesky(d),
            bytes=2.0 * _F32 * d * d,
            peak_bytes=found.peak_bytes,
        )
    )
    return found.value


def _steps(report: Report, layer: Layer, widths: tuple[int, ...], device: torch.device) -> float:
    """Search, column loop and cost for these widths; seconds of the column loop."""
    d_out, d_in = layer.shape
    n, weights = len(widths), d_out * d_in
    choices = [Choice(bits=bits, group_size=layer.group_size) for bits in widths]
    label = f"{layer.name}, {n} width{'s' if n > 1 else ''}"
    Wt, v = layer.W.T.contiguous(), search_importance(layer.factor)
    search = measured(lambda: search_scales_transposed(Wt, v, choices, grid=GRID), device, repeats=REPEATS)
    trials = sum(search_trials(choice, d_in, GRID) for choice in choices)
    report.add(
        Row(
            part=PART,
            name=f"{label}: scale search",
            seconds=search.seconds,
            bytes=_F32 * weights,
            peak_bytes=search.peak_bytes,
            figures={"ps a weight and scale tried": search.seconds / weights / trials * 1e12},
        )
    )
    scales = search.value
    del Wt
    loop = measured(lambda: gptq(layer.W, layer.factor, choices, scales=scales, grid=GRID), device, repeats=REPEATS)
    report.add(
        Row(
            part=PART,
            name=f"{label}: column loop with updates",
            seconds=loop.seconds,
            flops=flops.column_loop(d_out, d_in, n),
            bytes=_F32 * (weights + d_in * d_in / 2) + n * weights,
            peak_bytes=loop.peak_bytes,
        )
    )
    curvature = torch.ones(d_out, device=device)
    cost = measured(lambda: predicted_cost(layer.W, loop.value, layer.H, curvature), device, repeats=REPEATS)
    report.add(
        Row(
            part=PART,
            name=f"{label}: cost",
            seconds=cost.seconds,
            flops=flops.quadratic_form(d_out, d_in, n),
            bytes=_F32 * (weights + d_in * d_in / 2) + n * weights,
            peak_bytes=cost.peak_bytes,
        )
    )
    return loop.seconds


def _loss(report: Report, layer: Layer, device: torch.device) -> None:
    """Undamped loss of some rows, float64, against the paper's algorithm in float64 and against rounding to nearest."""
    choice = Choice(bits=ONE_WIDTH, group_size=layer.group_size)
    W = layer.W[:REFERENCE_ROWS]
    v = search_importance(layer.factor)
    scales = search_scales_transposed(W.T.contiguous(), v, [choice], grid=GRID)
    ours = gptq(layer.W, layer.factor, [choice], grid=GRID)[0].rows(slice(0, len(W))).dequantize(torch.float32)
    nearest = round_to_nearest(W, choice, grid=GRID).dequantize(torch.float32)
    H = layer.H.double()
    losses = [total_loss(W, Q, H) for Q in (ours, nearest)]
    reference = paper_gptq(W.double(), H, scales[0], choice, damping=layer.factor.damping, order=layer.factor.order)
    exact = total_loss(W, reference, H)
    report.add(
        Row(
            part=PART,
            name=f"{layer.name}, {ONE_WIDTH} bits: undamped loss, {len(W)} rows",
            figures={
                "to float64 reference - 1": losses[0] / exact - 1,
                "to nearest": losses[0] / losses[1],
                "codes that differ": float((reference - ours).abs().gt(1e-6 * reference.abs().amax()).float().mean()),
            },
        )
    )
    del H, reference
    release(device)


def _precision(report: Report, layer: Layer, device: torch.device) -> None:
    """Updates in other precisions: seconds, and undamped loss of all rows against that with float32 products."""
    choice = Choice(bits=ONE_WIDTH, group_size=layer.group_size)
    d_out, d_in = layer.shape
    v = search_importance(layer.factor)
    scales = search_scales_transposed(layer.W.T.contiguous(), v, [choice], grid=GRID)[0]
    base = 0.0
    for name, product in PRODUCTS.items():
        sweep(layer.W, layer.factor, scales, choice, product)
        Q, seconds = sweep(layer.W, layer.factor, scales, choice, product)
        loss = total_loss(layer.W, Q, layer.H)
        del Q
        release(device)
        base = base or loss
        report.add(
            Row(
                part="precision",
                name=f"{layer.name}, {ONE_WIDTH} bits: updates in {name}",
                seconds=seconds,
                flops=flops.column_loop(d_out, d_in),
                figures={"loss to fp32 - 1": loss / base - 1},
            )
        )
