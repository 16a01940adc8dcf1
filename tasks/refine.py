"""Refine: walk the blocks in order and quantize each for the inputs it gets behind the already quantized ones.

With no token weights and no correction this is plain sequential GPTQ: the control is made by the same code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lrpq.model.layers import Choice, LinearSpec
from lrpq.model.safetensors_source import ModelSource
from lrpq.quant.grid import Grid, QuantizedWeight
from lrpq.quant.packing import pack, unpack
from lrpq.refine.quantize import Refined, quantize_refined
from lrpq.refine.sweep import RefineSweep, SiteProducts, merge_products
from lrpq.shards import Node, root
from tasks.artifacts import StageFolder
from tasks.cluster import WorkerState
from tasks.store.objects import ObjectStore
from tasks.store.opened import open_store
from tasks.store.tensors import read_metadata, read_tensors, write_tensors
from tasks.streams import StreamJob, my_shards, open_stream, shard_slices

STAGE = "refine"
COUNTS = ("rejected_rows", "rows", "damping_steps", "dead_inputs")


@dataclass(frozen=True, slots=True, kw_only=True)
class RefineJob:
    """Parameters of the stage; the same on every worker."""

    stream: StreamJob
    folder: StageFolder
    token_weights: StageFolder | None
    """Profile stage whose token weights are used; None weighs all tokens alike."""
    choices: Mapping[str, Choice | None]
    """Module name -> choice; None is left as it is."""
    strength: float
    """Of the correction, 0 to 1."""
    damping: float
    """Of GPTQ, share of the mean diagonal."""
    correction_damping: float
    """Of the correction, share of the mean diagonal."""
    grid: str
    """``signed`` or ``symmetric``, see quant/grid.py."""


def begin(state: WorkerState, job: RefineJob) -> None:
    """Open the model and embed this worker's windows."""
    stream = open_stream(state, job.stream)
    shards = {shard.index: shard.tokens for shard in my_shards(state, job.stream)}
    sweep = RefineSweep(
        stream,
        shards,
        num_shards=job.stream.num_shards,
        micro_batch=job.stream.micro_batch,
        with_shift=job.strength > 0,
    )
    sweep.embed()
    state.held[STAGE] = sweep
    state.held["blocks"] = stream.stream(range(stream.num_blocks))


def enter(state: WorkerState, job: RefineJob, block: int) -> None:
    """Bring the block's weights and its token weights into memory."""
    index, module = next(state.held["blocks"])
    if index != block:
        raise RuntimeError(f"refinement is at block {index}, asked for {block}")
    state.held["module"] = module
    state.held["weights"] = None
    if job.token_weights is not None:
        sweep: RefineSweep = state.held[STAGE]
        key = job.token_weights.block("token-weights", block, "safetensors")
        by_site = read_tensors(open_store(job.stream.store), key)
        length = next(iter(sweep.shards.values())).shape[1] if sweep.shards else 1
        slices = shard_slices(next(iter(by_site.values())).numel() // length, length, job.stream.num_shards)
        state.held["weights"] = {
            site: {shard: s[slices[shard]] for shard in sweep.shards} for site, s in by_site.items()
        }


def products(
    state: WorkerState, block: int, site: tuple[LinearSpec, ...], *before: tuple[str, QuantizedWeight]
) -> dict[Node, SiteProducts]:
    """Sums of one site for this worker's shards; ``before`` are the block's modules quantized so far."""
    sweep: RefineSweep = state.held[STAGE]
    weights = state.held["weights"]
    return sweep.products(
        block,
        state.held["module"],
        site,
        None if weights is None else weights[site[0].input_site],
        _dense(sweep, before),
    )


def advance(state: WorkerState, block: int, *quantized: tuple[str, QuantizedWeight]) -> None:
    """Move the streams behind the block."""
    sweep: RefineSweep = state.held[STAGE]
    sweep.advance(block, state.held["module"], _dense(sweep, quantized))


def end(state: WorkerState) -> None:
    """Free what the stage holds."""
    state.held.pop("blocks").close()
    state.held.pop("weights", None)
    state.held.pop("module", None)
    state.held.pop(STAGE)


def quantize(state: WorkerState, job: RefineJob, spec: LinearSpec, *parts: Any) -> tuple[str, QuantizedWeight]:
    """Quantize one module from the workers' sums of its site and store its codes."""
    nodes: dict[Node, SiteProducts] = {}
    for part in parts:
        nodes |= part
    merged = root(nodes, job.stream.num_shards, merge_products)
    choice = job.choices[spec.name]
    if choice is None:
        raise RuntimeError(f"module {spec.name} is not quantized")
    W = ModelSource(Path(job.stream.model)).read(f"{spec.name}.weight").to(state.device, torch.float32)
    refined = quantize_refined(
        W,
        merged,
        choice,
        strength=job.strength,
        damping=job.damping,
        correction_damping=job.correction_damping,
        grid=Grid(job.grid),
        name=spec.name,
    )
    write_refined(open_store(job.stream.store), job.folder, spec.name, refined)
    return spec.name, _on_host(refined.weight)


def write_refined(store: ObjectStore, folder: StageFolder, name: str, refined: Refined) -> None:
    """Store one module's codes with how it went."""
    counts = {field: str(getattr(refined, field)) for field in COUNTS}
    choice = refined.weight.choice
    write_tensors(
        store,
        folder.module(name),
        {k: v.cpu() for k, v in pack(refined.weight).items()},
        {"bits": str(choice.bits), "group_size": str(choice.group_size), **counts},
    )


def read_refined(store: ObjectStore, folder: StageFolder, name: str, choice: Choice) -> QuantizedWeight:
    """Codes of one refined module."""
    return unpack(read_tensors(store, folder.module(name)), choice)


def read_counts(store: ObjectStore, folder: StageFolder, specs: Sequence[LinearSpec]) -> dict[str, int]:
    """How it went, summed over modules: see Refined."""
    counts = dict.fromkeys(COUNTS, 0)
    for spec in specs:
        metadata = read_metadata(store, folder.module(spec.name))
        counts = {field: counts[field] + int(metadata[field]) for field in COUNTS}
    return counts


def load_refined(state: WorkerState, job: RefineJob, spec: LinearSpec) -> tuple[str, QuantizedWeight]:
    """Codes of a module refined before this run was interrupted."""
    choice = job.choices[spec.name]
    if choice is None:
        raise RuntimeError(f"module {spec.name} is not quantized")
    return spec.name, read_refined(open_store(job.stream.store), job.folder, spec.name, choice)


def _dense(sweep: RefineSweep, quantized: tuple[tuple[str, QuantizedWeight], ...]) -> dict[str, torch.Tensor]:
    return {name: weight.dequantize(sweep.stream.dtype) for name, weight in quantized}


def _on_host(weight: QuantizedWeight) -> QuantizedWeight:
    return QuantizedWeight(codes=weight.codes.cpu(), scales=weight.scales.cpu(), choice=weight.choice)
