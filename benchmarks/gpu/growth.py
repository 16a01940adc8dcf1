"""Seconds of both stages and of GPTQ against tokens, width and depth, with exponents fitted in logarithms.

python -m benchmarks.gpu.growth ROWS.json PNG    draws what a run has measured, where matplotlib is
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Iterable, Sequence
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
POINT = "point"


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
    base = replace(windows, windows=grid.base_windows)
    shape = of_width(grid.base_width, head_width=grid.head_width)
    axes = {
        "tokens": [(n * windows.length, shape, 1, replace(base, windows=n)) for n in grid.tokens],
        "width": [(h, of_width(h, head_width=grid.head_width), 1, base) for h in grid.widths],
        "depth": [(d, shape, d, base) for d in grid.depths],
    }
    for axis, points in axes.items():
        for x, of_point, layers, cut in points:
            found = _stages(device, of_point, layers, cut)
            if axis == "width":
                found["quantize"] = _quantize(device, of_point, group_size)
            report.add(Row(part=PART, name=f"{POINT} {axis} {x}", figures=found))
            release(device)
    for curve in curves_of(report.rows):
        report.add(Row(part=PART, name=f"{curve.stage} against {curve.axis}", figures={"exponent": curve.exponent}))
    if png is not None:
        if importlib.util.find_spec("matplotlib") is None:
            report.say(
                f"{PART}: not drawn, matplotlib is not installed; python -m benchmarks.gpu.growth draws the JSON"
            )
        else:
            draw(curves_of(report.rows), png, title=report.device_name)


def curves_of(rows: Iterable[Row]) -> list[Curve]:
    """What the points among these rows lie on."""
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        if row.part == PART and row.name.startswith(POINT):
            _, axis, x = row.name.split()
            for stage, seconds in row.figures.items():
                points.setdefault((axis, stage), []).append((float(x), float(seconds)))
    return [
        Curve(stage=stage, axis=axis, x=[x for x, _ in found], seconds=[seconds for _, seconds in found])
        for (axis, stage), found in points.items()
    ]


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


def draw(curves: Sequence[Curve], png: Path, *, title: str) -> None:
    """Log-log plots, one an axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = dict.fromkeys(curve.axis for curve in curves)
    for place, axis in zip(figure.subplots(1, len(axes)), axes, strict=True):
        of_axis = [curve for curve in curves if curve.axis == axis]
        for curve in of_axis:
            place.loglog(curve.x, curve.seconds, "o-", label=f"{curve.stage}: {curve.exponent:.2f}")
        place.set(xlabel=axis, ylabel="seconds", title=f"against {axis} (exponents fitted)")
        place.set_xticks(of_axis[0].x, [f"{x:g}" for x in of_axis[0].x])
        place.set_xticks([], minor=True)
        place.grid(visible=True, which="both", alpha=0.3)
        place.legend()
    figure.suptitle(title)
    figure.savefig(png, dpi=120)


if __name__ == "__main__":
    measured_rows = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    draw(curves_of([Row(**row) for row in measured_rows["rows"]]), Path(sys.argv[2]), title=measured_rows["device"])
