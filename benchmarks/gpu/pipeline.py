"""A whole model from tokens to codes through the workbench of `lrpq compare`, and where the time goes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu.blocks import STAGE_FUNCTIONS
from benchmarks.gpu.layers import FUNCTIONS
from benchmarks.gpu.measure import now
from benchmarks.gpu.report import Figure, Report, Row
from benchmarks.gpu.timers import Timers
from lrpq.compare.memory import peak_memory
from lrpq.compare.prepared import Prepared
from lrpq.compare.recipes import DEFAULT
from lrpq.compare.terms import Terms
from lrpq.compare.workbench import Workbench
from lrpq.model.source import open_source

PART = "end-to-end"
PIPELINE_FUNCTIONS = {
    **FUNCTIONS,
    **STAGE_FUNCTIONS,
    "recomputed forward and backward": "lrpq.relevance.attribute:block_backward",
    "embedding": "lrpq.model.streaming:BlockStream.embed",
    "head and seeds": "lrpq.relevance.head:head_gradient",
    "forward sweep, the rest": "lrpq.relevance.sweep:ProfileSweep.forward",
    "gathering, the rest": "lrpq.importance.gather:GatherSweep.gather",
    "refine products, the rest": "lrpq.refine.sweep:RefineSweep.products",
    "refine advance, the rest": "lrpq.refine.sweep:RefineSweep.advance",
    "quantize_refined, the rest": "lrpq.refine.quantize:quantize_refined",
    "reading weights": "lrpq.model.safetensors_source:ModelSource.read",
    "allocation": "lrpq.allocate.knapsack:solve_exact",
}


def measure_pipeline(
    report: Report, device: torch.device, model: Path, tokens: Tensor, *, budget_bits: float, with_breakdown: bool
) -> None:
    """Evidence, plan and codes as a user's first run finds them, kernels still to be compiled; again with timers."""
    terms = Terms(device=str(device), shards=min(Terms().shards, len(tokens)))
    seconds: dict[str, Figure] = {}
    with peak_memory(str(device)) as peak:
        started = now(device)
        _once(model, tokens, terms, budget_bits, seconds)
        whole = now(device) - started
    report.add(
        Row(
            part=PART,
            name=f"{model.name}, {len(tokens)} x {tokens.shape[1]} tokens, {budget_bits:g} bits, first run",
            seconds=whole,
            peak_bytes=peak.bytes,
            figures=seconds,
        )
    )
    if not with_breakdown:
        return
    timers = Timers(device, PIPELINE_FUNCTIONS)
    with timers.watching():
        started = now(device)
        _once(model, tokens, terms, budget_bits, {})
        whole = now(device) - started
    report.add(Row(part=PART, name="with timers that wait for the device", seconds=whole))
    for label, spent in timers.ranked():
        share: dict[str, Figure] = {"share": f"{spent / whole:.1%}", "calls": timers.calls[label]}
        report.add(Row(part=PART, name=f"  {label}", seconds=spent, figures=share))
    rest = whole - sum(timers.seconds.values())
    report.add(Row(part=PART, name="  everything else", seconds=rest, figures={"share": f"{rest / whole:.1%}"}))
    if timers.absent:
        report.add(Row(part=PART, name="  not found in the core", figures={"names": ", ".join(timers.absent)}))


def _once(model: Path, tokens: Tensor, terms: Terms, budget_bits: float, seconds: dict[str, Figure]) -> None:
    device = torch.device(terms.device)
    marks = [now(device)]
    bench = Workbench(open_source(model), tokens, terms)
    prepared = Prepared(bench, [DEFAULT], [budget_bits])
    marks.append(now(device))
    plan = prepared.plan(DEFAULT.allocation, budget_bits)
    marks.append(now(device))
    bench.quantized(plan.choices, DEFAULT, prepared.gathered)
    marks.append(now(device))
    for i, name in enumerate(("evidence", "plan", "codes")):
        seconds[name] = marks[i + 1] - marks[i]
