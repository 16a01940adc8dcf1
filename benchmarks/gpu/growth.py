"""Seconds of both stages and of the candidates against tokens, width and depth, with exponents fitted in logarithms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.gpu import matrices
from benchmarks.gpu.blocks import Windows, run_of
from benchmarks.gpu.measure import measured, release
from benchmarks.gpu.model import RandomSource
from benchmarks.gpu.quantizer import GRID, ONE_WIDTH
from benchmarks.gpu.report import Report, Row
from benchmarks.gpu.shapes import BlockShape, of_width
from benchmarks.gpu.stages import run_profile, run_refine
from lrpq.model.layers import Choice
from lrpq.quant.factor import factorize
from lrpq.quant.gptq import gptq

PART = "growth"


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """What is varied; the other two stay at ``base``."""

    tokens: Sequence[int]
    """Windows."""
    widths: Sequence[int]
    depths: Sequence[int]
    base_windows: int
    base_width: int
    head_width: int
    """Of attention, whatever the model's width."""


FULL = Grid(
    tokens=(8, 16, 32, 64, 128),
    widths=(1024, 2048, 4096, 8192),
    depths=(1, 2, 4, 8),
    base_windows=32,
    base_width=4096,
    head_width=128,
)
TINY = Grid(tokens=(8, 16), widths=(64, 128), depths=(1, 2), base_windows=8, base_width=64, head_width=8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Seconds of a stage along one axis."""

    stage: str
    axis: str
    x: Sequence[float]
    seconds: Sequence[float]

    @property
    def exponent(self) -> float:
        """Least squares of log seconds on log x."""
        return slope([math.log(x) for x in self.x], [math.log(s) for s in self.seconds])


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the straight line of least squares."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - mean_x) ** 2 for a in x)


def measure_growth(
    report: Report, device: torch.device, grid: Grid, windows: Windows, *, group_size: int, png: Path | None
) -> None:
    """Print all points and exponents, and draw them where matplotlib can be imported."""
    curves: list[Curve] = []
    base = replace(windows, windows=grid.base_windows)
    shape = of_width(grid.base_width, head_width=grid.head_width)
    axes = {
        "tokens": [(n * windows.length, shape, 1, replace(base, windows=n)) for n in grid.tokens],
        "width": [(h, of_width(h, head_width=grid.head_width), 1, base) for h in grid.widths],
        "depth": [(d, shape, d, base) for d in grid.depths],
    }
    for axis, points in axes.items():
        seconds: dict[str, list[float]] = {}
        for x, of_point, layers, cut in points:
            found = _stages(device, of_point, layers, cut)
            if axis == "width":
                found["quantize"] = _quantize(device, of_point, group_size)
            for stage, value in found.items():
                seconds.setdefault(stage, []).append(value)
            report.add(Row(part=PART, name=f"{axis} {x}", figures={f"{k}, s": v for k, v in found.items()}))
            release(device)
        for stage, values in seconds.items():
            curve = Curve(stage=stage, axis=axis, x=[float(p[0]) for p in points], seconds=values)
            curves.append(curve)
            report.add(Row(part=PART, name=f"{stage} against {axis}", figures={"exponent": curve.exponent}))
    if png is not None:
        _draw(report, curves, png)


def _stages(device: torch.device, shape: BlockShape, layers: int, windows: Windows) -> dict[str, float]:
    source = RandomSource(shape, layers=layers, length=windows.length, device=device)
    run = run_of(source, windows, device)
    small = replace(run, tokens=run.tokens[: windows.micro_batch], shards=1)
    found = {}
    for name, stage in (("profile", run_profile), ("refine", run_refine)):
        stage(small)
        found[name] = stage(run).seconds
    return found


def _quantize(device: torch.device, shape: BlockShape, group_size: int) -> float:
    """Factorisation, search and column loop at one width, of the down projection."""
    d_out, d_in = shape.layers["down"]
    H, W = matrices.hessian(d_in, seed=1, device=device), matrices.weights(d_out, d_in, seed=2, device=device)
    choice = Choice(bits=ONE_WIDTH, group_size=group_size)
    return measured(lambda: gptq(W, factorize(H), [choice], grid=GRID), device).seconds


def _draw(report: Report, curves: Sequence[Curve], png: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        report.add(Row(part=PART, name="plot", error="matplotlib is not installed; the points are in the JSON file"))
        return
    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = dict.fromkeys(curve.axis for curve in curves)
    for place, axis in zip(figure.subplots(1, len(axes)), axes, strict=True):
        for curve in (c for c in curves if c.axis == axis):
            place.loglog(curve.x, curve.seconds, "o-", label=f"{curve.stage}: {curve.exponent:.2f}")
        place.set(xlabel=axis, ylabel="seconds", title=f"against {axis} (exponents fitted)")
        place.grid(visible=True, which="both", alpha=0.3)
        place.legend()
    figure.suptitle(report.device_name)
    figure.savefig(png, dpi=120)
    report.say(f"{PART}: drawn to {png}")
