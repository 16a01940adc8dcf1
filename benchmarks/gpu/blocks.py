"""One block of every shape through the profile and through the refinement, against necessary FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.gpu.flops import BlockFlops, block_flops, pass_bytes
from benchmarks.gpu.measure import release
from benchmarks.gpu.model import RandomSource, random_tokens
from benchmarks.gpu.report import Report, Row
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
    "merging refinement sums": "lrpq.refine.sweep:merge_products",
}
"""Timed for the breakdown; what is left of a stage is printed as its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """Calibration windows and how they are cut."""

    windows: int
    length: int
    shards: int
    micro_batch: int


def measure_blocks(
    report: Report, device: torch.device, shapes: list[BlockShape], windows: Windows, *, with_breakdown: bool
) -> None:
    """Print both stages of one block of every shape, their breakdown, and the sums for the whole models."""
    for shape in shapes:
        source = RandomSource(shape, layers=1, length=windows.length, device=device)
        flops = block_flops(shape, windows=windows.windows, length=windows.length)
        one_pass = pass_bytes(shape, windows=windows.windows, length=windows.length, micro_batch=windows.micro_batch)
        release(device)
        run = run_of(source, windows, device)
        small = run_of(
            source,
            Windows(windows=windows.micro_batch, length=windows.length, shards=1, micro_batch=windows.micro_batch),
            device,
        )
        for name, stage, necessary, passes in (
            ("profile", run_profile, flops.profile, 4),
            ("refine", run_refine, flops.refine, 2),
        ):
            times, error = _attempt(stage, small, run, device)
            release(device)
            if times is None:
                report.add(Row(part=PART, name=f"{shape.name} {name}, one block", error=error))
                continue
            _add(report, shape, name, times, necessary, passes * one_pass, flops)
            release(device)
            if with_breakdown:
                _breakdown(report, shape, name, stage, run, device)
                release(device)


def _attempt(
    stage: Callable[[Run], StageTimes], small: Run, run: Run, device: torch.device
) -> tuple[StageTimes | None, str]:
    """Times, or why there are none: a card may be too small for a block."""
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
    )


def _add(
    report: Report,
    shape: BlockShape,
    name: str,
    times: StageTimes,
    necessary: float,
    nbytes: float,
    flops: BlockFlops,
) -> None:
    figures: dict[str, float | int | str] = dict(times.parts)
    if name == "profile" and report.ceiling is not None:
        figures["of bf16 without recomputing"] = flops.profile_once / times.seconds / report.ceiling.bf16
    figures |= {f"({step})": seconds for step, seconds in times.outside.items()}
    report.add(
        Row(
            part=PART,
            name=f"{shape.name} {name}, one block",
            seconds=times.seconds,
            flops=necessary,
            bytes=nbytes,
            peak_bytes=times.peak_bytes,
            blocks=shape.blocks,
            figures=figures,
        )
    )
    whole = {"minutes": times.seconds * shape.blocks / 60}
    report.add(
        Row(
            part=PART,
            name=f"{shape.name} {name}, {shape.blocks} blocks (computed)",
            seconds=times.seconds * shape.blocks,
            figures=whole,
        )
    )


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
    figures: dict[str, float | int | str] = {k: v for k, v in timers.ranked() if v > 0}
    figures["rest of the blocks and outside of them"] = times.seconds + outside - sum(timers.seconds.values())
    if timers.absent:
        figures["NOT FOUND"] = ", ".join(timers.absent)
    report.add(
        Row(part=PART, name=f"{shape.name} {name}, by function, s", seconds=times.seconds + outside, figures=figures)
    )
