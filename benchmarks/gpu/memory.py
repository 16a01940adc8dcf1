"""Peak device memory: a small model at two depths, and the refinement of one 70B block, quantization included."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.gpu.blocks import Windows, run_of
from benchmarks.gpu.layers import BITS, Refinement, gradients_moments, refined
from benchmarks.gpu.measure import now, release
from benchmarks.gpu.model import RandomSource
from benchmarks.gpu.report import Report, Row
from benchmarks.gpu.shapes import BlockShape
from benchmarks.gpu.stages import run_profile, run_refine
from lrpq.model.layers import Choice, LinearSpec
from lrpq.refine.products import SiteProducts

PART = "memory"
DEPTHS = (4, 16)


def measure_refinement(
    report: Report, device: torch.device, shape: BlockShape, windows: Windows, options: Refinement
) -> None:
    """Peak while a block's layers are quantized, with both streams and what they keep in memory."""
    source = RandomSource(shape, layers=1, length=windows.length, device=device)
    release(device)
    run = run_of(source, windows, device)
    choice = Choice(bits=BITS, group_size=options.group_size)

    def quantizer(W: Tensor, products: SiteProducts, spec: LinearSpec) -> Tensor:
        outputs = gradients_moments(spec.d_out, seed=0, device=device) if options.row_blocks > 1 else None
        Q: Tensor = refined(W, products, outputs, choice, options).weight.dequantize(torch.bfloat16)
        return Q

    started = now(device)
    times = run_refine(run, quantizer)
    report.add(
        Row(
            part=PART,
            name=f"{shape.name} refine and quantize, one block",
            seconds=now(device) - started,
            peak_bytes=times.peak_bytes,
        )
    )


def measure_depths(report: Report, device: torch.device, shape: BlockShape, windows: Windows) -> None:
    """Peaks of both stages of one model at two depths."""
    for name, stage in (("profile", run_profile), ("refine", run_refine)):
        peaks: list[int] = []
        for depth in DEPTHS:
            source = RandomSource(shape, layers=depth, length=windows.length, device=device)
            release(device)
            run = run_of(source, windows, device)
            times = stage(run)
            del source, run
            release(device)
            peaks.append(times.peak_bytes)
            report.add(
                Row(
                    part=PART,
                    name=f"{name}, hidden {shape.hidden}, {depth} blocks",
                    seconds=times.seconds,
                    peak_bytes=times.peak_bytes,
                )
            )
        figures = {"times": peaks[-1] / max(1, peaks[0])}
        report.add(Row(part=PART, name=f"{name}: peak at {DEPTHS[-1]} blocks to {DEPTHS[0]}", figures=figures))
