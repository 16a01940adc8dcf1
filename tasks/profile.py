"""Profile: relevance of every token and output, and the relevance-weighted Hessian of every input site.

Workers stream all blocks forward and backward for their shards. A block's sums are merged in the fixed tree and stored
as soon as every worker has gone through it, so memory holds the sums of the block at hand only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from lrpq.model.kept import KeptInputs
from lrpq.model.linears import EXPERTS
from lrpq.quant.hessian import HessianSum, merge
from lrpq.refine.routed import POOLED
from lrpq.relevance.composite import Relevance
from lrpq.relevance.sweep import BlockSums, ProfileSweep, SiteWeights, merge_block_sums
from lrpq.shards import Node, root
from tasks.artifacts import StageFolder
from tasks.cluster import WorkerState
from tasks.store.objects import ObjectStore
from tasks.store.opened import open_store
from tasks.store.symmetric import read_symmetric, write_symmetric
from tasks.store.tables import write_table
from tasks.store.tensors import read_tensors, write_tensors
from tasks.streams import StreamJob, my_shards, open_stream, shard_slices

STAGE = "profile"
ROWS = ".rows"
"""Ending of the name under which an expert's token indices lie beside its token weights."""
SCORE_UNITS = {"value": "as named in the column unit"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileJob:
    """Parameters of the stage; the same on every worker."""

    stream: StreamJob
    folder: StageFolder
    relevance: str
    floor: float
    """Share of the mean token weight that every token gets."""
    power: float
    """Exponent of the token weights."""
    seed: int
    with_head: bool = False
    """Also what quantizing the head needs."""


def begin(state: WorkerState, job: ProfileJob) -> int:
    """Open the model and embed this worker's windows; returns the number of its tokens."""
    stream = open_stream(state, job.stream)
    sweep = ProfileSweep(
        stream,
        my_shards(state, job.stream),
        num_shards=job.stream.num_shards,
        relevance=Relevance(job.relevance),
        floor=job.floor,
        power=job.power,
        seed=job.seed,
        micro_batch=job.stream.micro_batch,
        kept=KeptInputs(memory_bytes=state.kept_bytes),
        with_head=job.with_head,
    )
    sweep.embed()
    state.held[STAGE] = sweep
    state.held["blocks"] = stream.stream(range(stream.num_blocks))
    return sum(shard.tokens.numel() for shard in sweep.shards)


def forward(state: WorkerState, block: int) -> None:
    """One block of the forward sweep."""
    index, module = next(state.held["blocks"])
    if index != block:
        raise RuntimeError(f"forward sweep is at block {index}, asked for {block}")
    state.held[STAGE].forward(block, module)


def seed_gradients(state: WorkerState) -> tuple[float, int]:
    """Sampled labels and their gradients at the last block; returns their loss in nats and their number."""
    sweep: ProfileSweep = state.held[STAGE]
    state.held["blocks"].close()
    state.held["blocks"] = sweep.stream.stream(range(sweep.stream.num_blocks - 1, -1, -1))
    return sweep.seed_gradients()


def take_head(state: WorkerState) -> dict[Node, BlockSums]:
    """Sums of the head for this worker's shards, and forget them."""
    sweep: ProfileSweep = state.held[STAGE]
    found, sweep.head_sums = sweep.head_sums, {}
    return found


def backward(state: WorkerState, block: int) -> tuple[dict[Node, BlockSums], dict[int, SiteWeights]]:
    """One block of the backward sweep; see ProfileSweep.backward."""
    index, module = next(state.held["blocks"])
    if index != block:
        raise RuntimeError(f"backward sweep is at block {index}, asked for {block}")
    result: tuple[dict[Node, BlockSums], dict[int, SiteWeights]] = state.held[STAGE].backward(block, module)
    return result


def end(state: WorkerState) -> dict[str, int]:
    """Free what the stage holds; returns what was spilled."""
    state.held.pop("blocks").close()
    sweep: ProfileSweep = state.held.pop(STAGE)
    spilled = sweep.kept.spilled_bytes
    sweep.kept.close()
    return {"spilled_bytes": spilled}


def store_block(state: WorkerState, job: ProfileJob, block: int, *parts: Any) -> dict[str, float]:
    """Merge the workers' sums of a block and store them: Hessians, curvature, token weights, scores.

    Returns:
        Module name -> output curvature summed over its outputs, nats per unit of output squared.
    """
    store = open_store(job.stream.store)
    nodes: dict[Node, BlockSums] = {}
    weights: dict[int, SiteWeights] = {}
    for sums, shard_weights in parts:
        nodes |= sums
        weights |= shard_weights
    merged = root(nodes, job.stream.num_shards, merge_block_sums)
    curvature = _write_sums(store, job, block, merged)
    total = merged.num_tokens
    tokens = _token_weights(weights, total_tokens=total, num_shards=job.stream.num_shards, length=job.stream.length)
    write_tensors(store, job.folder.block("token-weights", block, "safetensors"), tokens, {})
    write_table(
        store,
        job.folder.block("scores", block, "parquet"),
        score_table(block, curvature, tokens),
        units=SCORE_UNITS,
        kind="scores",
    )
    return {name: float(c.sum()) for name, c in curvature.items()}


def store_head(state: WorkerState, job: ProfileJob, block: int, *parts: dict[Node, BlockSums]) -> dict[str, float]:
    """Merge the workers' sums of the head and store them as those of the block behind the last one.

    Returns:
        As ``store_block``.
    """
    nodes: dict[Node, BlockSums] = {}
    for sums in parts:
        nodes |= sums
    merged = root(nodes, job.stream.num_shards, merge_block_sums)
    curvature = _write_sums(open_store(job.stream.store), job, block, merged)
    return {name: float(c.sum()) for name, c in curvature.items()}


def _write_sums(store: ObjectStore, job: ProfileJob, block: int, merged: BlockSums) -> dict[str, Tensor]:
    """Store Hessians and curvature; returns the curvature, nats per unit of output squared."""
    hessians = {**merged.hessians, **_pooled(merged.hessians)}
    total = merged.num_tokens
    write_symmetric(
        store,
        job.folder.block("hessians", block, "parquet"),
        {site: h.xx.cpu() for site, h in hessians.items()},
        {s: {"weight_sum": h.weight_sum, "num_tokens": h.num_tokens, "total": total} for s, h in hessians.items()},
    )
    curvature = {name: g2 / total for name, g2 in merged.curvature.items()}
    write_tensors(store, job.folder.block("curvature", block, "safetensors"), curvature, {})
    return curvature


def _pooled(hessians: Mapping[str, HessianSum]) -> dict[str, HessianSum]:
    """The sum over all experts' gate and up projections, which read the same; nothing in a dense block."""
    found = [h for site, h in hessians.items() if site.startswith(f"{EXPERTS}.") and site.endswith(".gate_up")]
    return {POOLED: reduce(merge, found)} if found else {}


def _token_weights(
    weights: Mapping[int, SiteWeights], *, total_tokens: int, num_shards: int, length: int
) -> dict[str, Tensor]:
    """Token weights of all shards, one after the other; those of experts with the index of their token."""
    slices = shard_slices(total_tokens // length, length, num_shards)
    found: dict[str, Tensor] = {}
    in_order = [weights[i] for i in sorted(weights)]
    for site in in_order[0].values:
        found[site] = torch.cat([part.values[site].cpu() for part in in_order])
    for site in in_order[0].rows:
        parts = [weights[i].rows[site].cpu() + slices[i].start for i in sorted(weights)]
        found[site + ROWS] = torch.cat(parts).to(torch.int32)
    return found


def score_table(block: int, curvature: Mapping[str, Tensor], tokens: Mapping[str, Tensor]) -> pa.Table:
    """One row a module or site and metric."""
    rows = [
        {"name": n, "block": block, "metric": "output_curvature", "value": float(c.sum()), "unit": "nats per output^2"}
        for n, c in sorted(curvature.items())
    ]
    for site, s in sorted(tokens.items()):
        if site.endswith(ROWS) or not len(s):
            continue
        share = float(s.max() / s.sum().clamp_min(torch.finfo(s.dtype).tiny))
        rows.append({"name": site, "block": block, "metric": "top_token_share", "value": share, "unit": "1"})
    return pa.Table.from_pylist(rows)


def read_hessian(job: ProfileJob, block: int, site: str) -> tuple[HessianSum, int]:
    """Hessian sums of one site, and the calibration tokens of the run (an expert saw fewer)."""
    xx, scalars = read_symmetric(open_store(job.stream.store), job.folder.block("hessians", block, "parquet"), site)
    sums = HessianSum(xx=xx, weight_sum=scalars["weight_sum"], num_tokens=int(scalars["num_tokens"]))
    return sums, int(scalars["total"])


def read_curvature(job: ProfileJob, block: int, names: list[str]) -> dict[str, Tensor]:
    """Output curvature c [d_out] (float64) of some modules of a block."""
    return read_tensors(open_store(job.stream.store), job.folder.block("curvature", block, "safetensors"), names)
