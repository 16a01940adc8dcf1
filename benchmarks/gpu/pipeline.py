"""A whole model from tokens to a checkpoint through the workbench of `lrpq compare`, and where the time goes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu.blocks import STAGE_FUNCTIONS
from benchmarks.gpu.layers import FUNCTIONS
from benchmarks.gpu.measure import now
from benchmarks.gpu.report import Figure, Report, Row
from benchmarks.gpu.timers import Timers
from lrpq.checkpoint.assemble import write_checkpoint
from lrpq.compare.memory import peak_memory
from lrpq.compare.prepared import Prepared
from lrpq.compare.recipes import DEFAULT
from lrpq.compare.terms import Terms
from lrpq.compare.workbench import Workbench
from lrpq.model.source import open_source
from tasks.resources import cut_of

PART = "end-to-end"
STAGES = ("evidence", "plan", "codes", "checkpoint")
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
    """Evidence, plan, codes and checkpoint as a user's first run finds them, kernels still to be compiled; again with
    timers."""
    cut = cut_of(
        device=device.type,
        num_windows=len(tokens),
        length=tokens.shape[1],
        hidden=open_source(model).config.get_text_config().hidden_size,
    )
    terms = Terms(scale_bits=8, device=str(device), shards=cut.shards, micro_batch=cut.micro_batch)
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
            figures=dict(seconds),
        )
    )
    if not with_breakdown:
        return
    watched = {stage: Timers(device, PIPELINE_FUNCTIONS) for stage in STAGES}
    _once(model, tokens, terms, budget_bits, seconds, watched)
    whole = sum(float(value) for value in seconds.values())
    report.add(Row(part=PART, name="again, with timers that wait", seconds=whole, figures=dict(seconds)))
    for stage, timers in watched.items():
        spent = float(seconds[stage])
        rest = ("everything else", spent - sum(timers.seconds.values()))
        for label, own in [*timers.ranked(), rest]:
            share: dict[str, Figure] = {"share of all": f"{own / whole:.1%}", "calls": timers.calls[label]}
            report.add(Row(part=PART, name=f"  {stage}: {label}", seconds=own, figures=share))
        if timers.absent:
            names: dict[str, Figure] = {"names": ", ".join(timers.absent)}
            report.add(Row(part=PART, name=f"  {stage}: NOT FOUND in the core", figures=names))


def _once(
    model: Path,
    tokens: Tensor,
    terms: Terms,
    budget_bits: float,
    seconds: dict[str, Figure],
    timers: Mapping[str, Timers] | None = None,
) -> None:
    """Run all; ``seconds`` is filled by stage."""
    device = torch.device(terms.device)

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        with nullcontext() if timers is None else timers[name].watching():
            started = now(device)
            yield
            seconds[name] = now(device) - started

    with stage("evidence"):
        bench = Workbench(open_source(model), tokens, terms).scaled()
        prepared = Prepared(bench, [DEFAULT], [budget_bits])
    with stage("plan"):
        plan = prepared.plan(DEFAULT.allocation, budget_bits)
    with stage("codes"):
        found = bench.quantized(plan.choices, DEFAULT, prepared.gathered)
    with stage("checkpoint"), tempfile.TemporaryDirectory() as scratch:
        write_checkpoint(
            bench.source,
            Path(scratch) / "checkpoint",
            quantized=found.codes.get,
            choices={name: choice for name, choice in plan.choices.items() if choice is not None},
            specs=bench.stream().specs,
            manifest={},
        )
