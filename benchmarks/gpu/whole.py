"""The whole model, from what was measured of its blocks."""

from __future__ import annotations

from benchmarks.gpu.report import Figure, Report, Row
from benchmarks.gpu.shapes import BlockShape

PART = "total"
STAGES = ("profile", "candidates", "refine", "quantize")


def add_total(report: Report, shape: BlockShape) -> None:
    """Minutes of compute for all blocks; an error names the stages that were measured neither here nor before."""
    seconds: dict[str, float] = {}
    for row in [*report.earlier, *report.rows]:
        for stage in STAGES:
            if row.blocks and row.name == f"{shape.name} {stage}, one block":
                seconds[stage] = row.seconds * row.blocks
    missing = [stage for stage in STAGES if stage not in seconds]
    name = f"{shape.name}, {shape.blocks} blocks (computed)"
    if missing:
        report.add(Row(part=PART, name=name, error=f"not measured: {', '.join(missing)}"))
        return
    figures: dict[str, Figure] = {f"{stage}, min": value / 60 for stage, value in seconds.items()}
    figures["all, min"] = sum(seconds.values()) / 60
    report.add(Row(part=PART, name=name, seconds=sum(seconds.values()), figures=figures))
