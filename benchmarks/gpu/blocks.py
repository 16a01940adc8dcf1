"""One block of every shape through the profile and through the refinement, against necessary FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from benchmarks.gpu.flops import block_flops, pass_bytes
from benchmarks.gpu.measure import release
from benchmarks.gpu.model import RandomSource, random_tokens
from benchmarks.gpu.report import Figure, Report, Row
from benchmarks.gpu.shapes import BlockShape
from benchmarks.gpu.stages import Run, StageTimes, run_profile, run_refine
from benchmarks.gpu.timers import Timers

PART = "block"
STAGE_FUNCTIONS = {
    "forward of the stream": "lrpq.model.streaming:BlockStream.run",
    "recomputed forward and backward": "lrpq.relevance.sweep:block_backward",
    "Hessians": "lrpq.quant.hessian:accumulate",
    "output moments": "lrpq.relevance.outputs:add_outputs",
    "token weights": "lrpq.relevance.weights:token_weights",
    "kept inputs to the host": "lrpq.model.kept:KeptInputs.put",
    "kept inputs back": "lrpq.model.kept:KeptInputs.take",
    "merging profile sums": "lrpq.relevance.sweep:merge_block_sums",
    "merging refinement sums": "lrpq.refine.products:merge_products",
}
"""Timed for the breakdown; what is left of a stage is printed as its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """Calibration windows and how they are cut."""

    windows: int
    length: int
    shards: int
    micro_batch: int
    low_memory: bool = False


STAGES: Mapping[str, Callable[[Run], StageTimes]] = {"profile": run_profile, "refine": run_refine}
SMALLEST_SHARE = 8
"""A block that is too large for a card is tried on half of the windows, and so on down to this part of them."""


def measure_blocks(
    report: Report, device: torch.device, shapes: list[BlockShape], windows: Windows, *, with_breakdown: bool
) -> None:
    """Print both stages of one block of every shape, their breakdown, and the sums for the whole models."""
    for shape in shapes:
        source = RandomSource(shape, layers=1, length=windows.length, device=device)
        release(device)
        for name, stage in STAGES.items():
            cut, times = _largest(report, f"{shape.name} {name}", source, windows, stage, device)
            release(device)
            if times is None:
                continue
            _add(report, shape, name, times, cut, whole=cut == windows)
            if with_breakdown:
                _breakdown(report, shape, name, stage, run_of(source, cut, device), device)
                release(device)


def _largest(
    report: Report,
    label: str,
    source: RandomSource,
    windows: Windows,
    stage: Callable[[Run], StageTimes],
    device: torch.device,
) -> tuple[Windows, StageTimes | None]:
    """Times on all windows, or on as many as fit; what did not fit is a failed row each."""
    one = replace(windows, windows=windows.micro_batch, shards=1)
    cut = windows
    while True:
        times, error = _attempt(stage, run_of(source, one, device), run_of(source, cut, device), device)
        release(device)
        if times is not None:
            return cut, times
        report.add(Row(part=PART, name=f"{label}, one block, {cut.windows} windows", error=error))
        fewer = cut.windows // 2
        if fewer * SMALLEST_SHARE < windows.windows or fewer < cut.shards:
            return cut, None
        cut = replace(cut, windows=fewer)


def _attempt(
    stage: Callable[[Run], StageTimes], small: Run, run: Run, device: torch.device
) -> tuple[StageTimes | None, str]:
    """Times, or why there are none."""
    try:
        stage(small)  # compiles kernels, loads libraries
        release(device)
        return stage(run), ""
    except torch.OutOfMemoryError as error:
        return None, str(error).split(". ")[0]


def run_of(source: RandomSource, windows: Windows, device: torch.device) -> Run:
    """A run of this model on random windows."""
    return Run(
        source=source,
        tokens=random_tokens(windows.windows, windows.length),
        device=device,
        shards=windows.shards,
        micro_batch=windows.micro_batch,
        low_memory=windows.low_memory,
    )


def _add(report: Report, shape: BlockShape, name: str, times: StageTimes, cut: Windows, *, whole: bool) -> None:
    flops = block_flops(shape, windows=cut.windows, length=cut.length)
    one_pass = pass_bytes(shape, windows=cut.windows, length=cut.length, micro_batch=cut.micro_batch)
    necessary, passes = (flops.profile, 4) if name == "profile" else (flops.refine, 2)
    figures: dict[str, Figure] = dict(times.parts)
    if name == "profile" and report.ceiling is not None:
        figures["of bf16 without recomputing"] = flops.profile_once / times.seconds / report.ceiling.bf16
    figures |= {f"({step})": seconds for step, seconds in times.outside.items()}
    label = f"{shape.name} {name}, one block" + ("" if whole else f", {cut.windows} windows")
    report.add(
        Row(
            part=PART,
            name=label,
            seconds=times.seconds,
            flops=necessary,
            bytes=passes * one_pass,
            peak_bytes=times.peak_bytes,
            blocks=shape.blocks if whole else 0,
            figures=figures,
        )
    )
    if whole:
        seconds = times.seconds * shape.blocks
        label = f"{shape.name} {name}, {shape.blocks} blocks (computed)"
        report.add(Row(part=PART, name=label, seconds=seconds, figures={"minutes": seconds / 60}))


def _breakdown(
    report: Report,
    shape: BlockShape,
    name: str,
    stage: Callable[[Run], StageTimes],
    run: Run,
    device: torch.device,
) -> None:
    """The same once more with timers that wait for the device."""
    timers = Timers(device, STAGE_FUNCTIONS)
    with timers.watching():
        times = stage(run)
    outside = sum(times.outside.values())
    figures: dict[str, Figure] = {k: v for k, v in timers.ranked() if v > 0}
    figures["rest of the blocks and outside of them"] = times.seconds + outside - sum(timers.seconds.values())
    if timers.absent:
        figures["NOT FOUND"] = ", ".join(timers.absent)
    report.add(
        Row(part=PART, name=f"{shape.name} {name}, by function, s", seconds=times.seconds + outside, figures=figures)
    )
