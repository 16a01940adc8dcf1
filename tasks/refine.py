"""Refine: walk the blocks in order and quantize each for the inputs it gets behind the already quantized ones.

With no token weights and no correction this is plain sequential GPTQ: the control is made by the same code.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lrpq.activations.apply import GridActivations
from lrpq.model.experts import GATE_UP
from lrpq.model.layers import Choice, LinearSpec
from lrpq.quant.ahead import compile_trellis_ahead
from lrpq.quant.grid import Grid, QuantizedWeight
from lrpq.quant.packing import pack, unpack
from lrpq.quant.starved import Evidence, hessian_of_expert
from lrpq.refine.products import SiteProducts, copied, merge_products
from lrpq.refine.quantize import Refined, quantize_refined
from lrpq.refine.routed import dense_weights, routed_products
from lrpq.refine.sweep import RefineSweep
from lrpq.relevance.outputs import Outputs
from lrpq.shards import Node, root
from tasks.artifacts import StageFolder
from tasks.chosen_grids import read_grids
from tasks.device_copies import to_device, to_host
from tasks.profile_job import ROWS
from tasks.profile_reads import read_outputs
from tasks.store.objects import ObjectStore
from tasks.store.opened import open_store
from tasks.store.tensors import read_metadata, read_tensors, write_tensors
from tasks.streams import StreamJob, my_shards, open_copies, open_stream, read_weight, shard_slices
from tasks.upper_triangle import packed, unpacked
from tasks.waypoints import blocks_with_waypoint, read_waypoint, write_waypoint
from tasks.worker import WorkerState

STAGE = "refine"
QUANTIZED, ORIGINAL = "quantized", "original"
"""The two streams in a waypoint."""
COUNTS = (
    "rejected_rows",
    "rows",
    "damping_steps",
    "dead_inputs",
    "rows_alone",
    "experts_pooled",
    "experts_without_tokens",
)


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
    polish_rounds: int
    """Of coordinate descent and refit after rounding."""
    row_blocks: int
    """Blocks of rows that make up for each other's errors, with what the profile knows of the outputs; 1 is none."""
    grid: str
    """``signed`` or ``symmetric``, see quant/grid.py."""


def first_block(job: RefineJob, specs: Sequence[Sequence[LinearSpec]]) -> int:
    """The block in front of which the refinement begins or goes on, by what is stored.

    Args:
        job: the stage.
        specs: layers of every block.
    """
    store = open_store(job.stream.store)
    present = set(store.list(job.folder.prefix))
    whole = 0  # blocks from the first one on of which every module is stored
    while whole < len(specs) and all(
        job.folder.module(spec.name) in present for spec in specs[whole] if job.choices[spec.name] is not None
    ):
        whole += 1
    if whole == len(specs):
        return whole
    known = blocks_with_waypoint(store, job.folder, STAGE, job.stream.num_shards)
    return max((block for block in known if block <= whole), default=0)


def begin(state: WorkerState, job: RefineJob, block: int) -> None:
    """Open the model and bring this worker's windows in front of a block."""
    if state.device == "cpu" and any(choice is not None and choice.trellis for choice in job.choices.values()):
        threading.Thread(target=compile_trellis_ahead, name="lrpq-compile", daemon=True).start()
    stream = open_stream(state, job.stream)
    chosen = job.stream.activations
    shards = {shard.index: shard.tokens for shard in my_shards(state, job.stream)}
    sweep = RefineSweep(
        stream,
        shards,
        num_shards=job.stream.num_shards,
        micro_batch=job.stream.micro_batch,
        with_shift=job.strength > 0,
        activations=None if chosen is None else GridActivations(stream=stream, grids=read_grids(chosen)),
        low_memory=open_copies(state),
    )
    sweep.on_batch = state.beat
    sweep.embed()  # also where a waypoint follows: it records what blocks are called with
    if block:
        for shard, tensors in read_waypoint(open_store(job.stream.store), job.folder, STAGE, block, shards).items():
            batches = range(len(sweep.quantized[shard]))
            sweep.quantized[shard] = sweep.row(tensors[f"{QUANTIZED}|{i:05d}"].to(stream.device) for i in batches)
            if sweep.with_shift:
                sweep.original[shard] = sweep.row(tensors[f"{ORIGINAL}|{i:05d}"].to(stream.device) for i in batches)
    state.held[STAGE] = sweep
    state.held["blocks"] = stream.stream(range(block, stream.num_blocks))


def keep(state: WorkerState, job: RefineJob, block: int) -> None:
    """Store this worker's streams in front of a block."""
    sweep: RefineSweep = state.held[STAGE]
    shards = {
        shard: {
            **{f"{QUANTIZED}|{i:05d}": to_host(batch) for i, batch in enumerate(batches)},
            **{f"{ORIGINAL}|{i:05d}": to_host(batch) for i, batch in enumerate(sweep.original.get(shard, ()))},
        }
        for shard, batches in sweep.quantized.items()
    }
    write_waypoint(open_store(job.stream.store), job.folder, STAGE, block, shards)


def enter(state: WorkerState, job: RefineJob, block: int) -> None:
    """Bring the block's weights and its token weights into memory."""
    index, module = next(state.held["blocks"])
    if index != block:
        raise RuntimeError(f"refinement is at block {index}, asked for {block}")
    state.held["module"] = module
    state.held["weights"] = None
    state.held["products"] = {}
    state.held["pooled"] = False
    if job.token_weights is not None:
        sweep: RefineSweep = state.held[STAGE]
        stored = read_tensors(
            open_store(job.stream.store), job.token_weights.block("token-weights", block, "safetensors")
        )
        state.held["weights"] = shard_weights(stored, sweep.shards, job.stream)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedModule:
    """A module's codes in host memory, or those of some parts of its rows, as they go from worker to worker."""

    name: str
    first_row: int
    weight: QuantizedWeight
    packed: Mapping[str, Tensor]
    """The same as it is stored; empty for a module that is stored."""
    counts: Mapping[str, str]
    """How it went (``COUNTS``), to be stored; empty for a module that is stored."""


def shard_weights(
    stored: Mapping[str, Tensor], shards: Collection[int], job: StreamJob
) -> dict[str, dict[int, Tensor]]:
    """Site -> shard -> token weights of all its tokens, from what the profile stored of a block."""
    total = max(s.numel() for s in stored.values())  # sites that see all tokens are in every block
    found: dict[str, dict[int, Tensor]] = {}
    for site, s in stored.items():
        if site.endswith(ROWS):
            continue
        rows = stored.get(site + ROWS)
        if rows is not None:
            s = dense_weights(s, rows.long(), total, default=_mean_of_experts(stored, kind=site.rsplit(".", 1)[-1]))
        slices = shard_slices(job.num_windows, s.numel() // job.num_windows, job.num_shards)
        found[site] = {shard: s[slices[shard]] for shard in shards}
    return found


def _mean_of_experts(stored: Mapping[str, Tensor], *, kind: str) -> float:
    """Mean token weight of one projection of a block's experts."""
    weights = torch.cat([s for site, s in stored.items() if site + ROWS in stored and site.endswith(f".{kind}")])
    return float(weights.mean()) if weights.numel() else 1.0


def products(state: WorkerState, block: int, step: tuple[LinearSpec, ...], *before: QuantizedModule) -> None:
    """Sums of a step's sites for this worker's shards, kept until they are taken.

    Args:
        state: the worker.
        block: index of the block.
        step: layers whose inputs are found in one forward (BlockStream.steps).
        before: the block's modules quantized so far.
    """
    sweep: RefineSweep = state.held[STAGE]
    weights = state.held["weights"]
    held = state.held["products"]
    if step[0].routed:
        pooled = step[0].kind == GATE_UP and not state.held["pooled"]
        state.held["pooled"] |= pooled
        dense = _dense(sweep, before)
        held |= routed_products(sweep, block, state.held["module"], step, weights, dense, pooled=pooled)
        return
    site = step[0].input_site
    held[site] = sweep.products(
        block, state.held["module"], step, None if weights is None else weights[site], _dense(sweep, before)
    )


def take(state: WorkerState, site: str, keep: bool = False) -> dict[Node, SiteProducts]:
    """Sums of one site for other workers: of the Hessian's the upper triangle, packed. They are forgotten, unless this
    worker still quantizes with them."""
    return {node: _with_hessian(sums, packed) for node, sums in _own(state, site, keep=keep).items()}


def _own(state: WorkerState, site: str, *, keep: bool) -> dict[Node, SiteProducts]:
    held: dict[str, dict[Node, SiteProducts]] = state.held["products"]
    return held.get(site, {}) if keep else held.pop(site, {})


def _with_hessian(sums: SiteProducts, change: Callable[[Tensor], Tensor]) -> SiteProducts:
    return replace(sums, hessian=replace(sums.hessian, xx=change(sums.hessian.xx)))


def advance(state: WorkerState, block: int, *quantized: QuantizedModule) -> None:
    """Move the streams behind the block."""
    sweep: RefineSweep = state.held[STAGE]
    sweep.advance(block, state.held["module"], _dense(sweep, quantized))


def end(state: WorkerState) -> None:
    """Free what the stage holds."""
    state.held.pop("blocks").close()
    state.held.pop("weights", None)
    state.held.pop("module", None)
    state.held.pop("products", None)
    state.held.pop("pooled", None)
    state.held.pop(STAGE)
    state.close_copies()


def quantize(
    state: WorkerState,
    job: RefineJob,
    spec: LinearSpec,
    cuts: Sequence[slice],
    num_parts: int,
    keep: bool,
    *parts: Any,
) -> QuantizedModule:
    """Quantize one module, or some of its rows, from the workers' sums of its site; ``store_module`` stores it, beside
    what comes next.

    Args:
        state: the worker, whose own sums of the site have not left its device.
        job: the stage.
        spec: the module.
        cuts: consecutive parts of its rows (lrpq.refine.row_parts).
        num_parts: how many of ``parts`` are sums of its own site, by other workers.
        keep: whether this worker needs its own sums again, for another module.
        parts: these, then those of all experts of the block where the module is an expert.
    """
    choice = job.choices[spec.name]
    if choice is None:
        raise RuntimeError(f"module {spec.name} is not quantized")
    merged = _merged(parts[:num_parts], job, state.device, own=_own(state, spec.input_site, keep=keep))
    evidence = Evidence.OWN
    if spec.routed:
        pooled = _merged(parts[num_parts:], job, state.device).hessian if len(parts) > num_parts else None
        sums, evidence = hessian_of_expert(merged.hessian, pooled, total_tokens=job.stream.num_tokens)
        if evidence is not Evidence.OWN:  # nothing to correct towards
            merged = SiteProducts(hessian=sums, shift=None)
    rows = slice(cuts[0].start, cuts[-1].stop)
    if merged.pull is not None:
        merged = replace(merged, pull=merged.pull[rows])
    refined = quantize_refined(
        read_weight(state, job.stream, spec)[rows],
        merged,
        choice,
        strength=job.strength,
        damping=job.damping,
        correction_damping=job.correction_damping,
        polish_rounds=job.polish_rounds,
        outputs=_outputs(job, spec, rows),
        row_blocks=job.row_blocks,
        grid=Grid(job.grid),
        parts=[cut.stop - cut.start for cut in cuts],
        on_step=state.beat,
        name=spec.name,
    )
    packed = {k: to_host(v) for k, v in pack(refined.weight).items()}  # here: a core takes seconds for a large layer
    codes, scales = to_host(refined.weight.codes), to_host(refined.weight.scales)
    weight = QuantizedWeight(codes=codes, scales=scales, choice=choice)
    counts = _counts(refined, evidence)
    return QuantizedModule(name=spec.name, first_row=rows.start, weight=weight, packed=packed, counts=counts)


def store_module(state: WorkerState, job: RefineJob, *parts: QuantizedModule) -> None:
    """Store a module's codes with how it went; ``parts`` make it up."""
    first = parts[0]
    ordered = sorted(parts, key=lambda part: part.first_row)
    tensors = {name: torch.cat([part.packed[name] for part in ordered]) for name in ("weight_packed", "weight_scale")}
    tensors["weight_shape"] = torch.tensor([len(tensors["weight_scale"]), int(first.packed["weight_shape"][1])])
    write_tensors(
        open_store(job.stream.store),
        job.folder.module(first.name),
        dict(first.packed) if len(parts) == 1 else tensors,
        {
            **{name: str(value) for name, value in asdict(first.weight.choice).items()},
            **_summed([part.counts for part in parts]),
        },
    )


def _summed(counts: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """How it went with all parts of a module: what counts rows or parts is added up, the rest is the same in each."""
    added = ("rejected_rows", "rows", "rows_alone")
    return {k: str(sum(int(part[k]) for part in counts)) if k in added else counts[0][k] for k in COUNTS}


def _outputs(job: RefineJob, spec: LinearSpec, rows: slice) -> Outputs | None:
    """What the profile knows of some of the module's outputs, where the job has a use for it."""
    if job.token_weights is None or job.row_blocks == 1 or spec.routed:
        return None
    return read_outputs(open_store(job.stream.store), job.token_weights, spec, rows)


def _merged(
    parts: Sequence[dict[Node, SiteProducts]],
    job: RefineJob,
    device: str,
    *,
    own: Mapping[Node, SiteProducts] | None = None,
) -> SiteProducts:
    """Sum of what other workers have sent, and of a worker's own, on the device that goes on with it: one core takes
    seconds where a GPU takes none."""
    to_this = partial(to_device, device=device)
    nodes = {node: copied(sums, to_this) for node, sums in (own or {}).items()}
    for part in parts:
        nodes |= {node: _with_hessian(copied(sums, to_this), unpacked) for node, sums in part.items()}
    return root(nodes, job.stream.num_shards, merge_products)


def _counts(refined: Refined, evidence: Evidence) -> dict[str, str]:
    """How it went, as the store has it."""
    return {
        "rejected_rows": str(refined.rejected_rows),
        "rows": str(refined.rows),
        "damping_steps": str(refined.damping_steps),
        "dead_inputs": str(refined.dead_inputs),
        "rows_alone": str(refined.rows_alone),
        "experts_pooled": str(int(evidence is Evidence.POOLED)),
        "experts_without_tokens": str(int(evidence is Evidence.NONE)),
    }


def read_refined(store: ObjectStore, folder: StageFolder, name: str, choice: Choice) -> QuantizedWeight:
    """Codes of one refined module."""
    return unpack(read_tensors(store, folder.module(name)), choice)


def read_counts(store: ObjectStore, folder: StageFolder, specs: Sequence[LinearSpec]) -> dict[str, int]:
    """How it went, summed over modules: see Refined and lrpq.quant.starved."""
    counts = dict.fromkeys(COUNTS, 0)
    for spec in specs:
        metadata = read_metadata(store, folder.module(spec.name))
        counts = {field: counts[field] + int(metadata[field]) for field in COUNTS}
    return counts


def load_refined(state: WorkerState, job: RefineJob, spec: LinearSpec) -> QuantizedModule:
    """Codes of a module refined before this run was interrupted."""
    choice = job.choices[spec.name]
    if choice is None:
        raise RuntimeError(f"module {spec.name} is not quantized")
    weight = read_refined(open_store(job.stream.store), job.folder, spec.name, choice)
    return QuantizedModule(name=spec.name, first_row=0, weight=weight, packed={}, counts={})


def _dense(sweep: RefineSweep, quantized: Sequence[QuantizedModule]) -> dict[str, torch.Tensor]:
    """Weights on the sweep's device, made there: one core of a host takes seconds for a large block."""
    device, dtype = sweep.stream.device, sweep.stream.dtype
    parts: dict[str, list[Tensor]] = {}
    for module in sorted(quantized, key=lambda module: module.first_row):
        parts.setdefault(module.name, []).append(_on(module.weight, device).dequantize(dtype))
    return {name: found[0] if len(found) == 1 else torch.cat(found) for name, found in parts.items()}


def _on(weight: QuantizedWeight, device: torch.device) -> QuantizedWeight:
    codes, scales = to_device(weight.codes, device), to_device(weight.scales, device)
    return QuantizedWeight(codes=codes, scales=scales, choice=weight.choice)
