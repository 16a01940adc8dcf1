"""Sums that a profile's workers find of a block: shared out, merged in the fixed tree, and stored."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from functools import partial, reduce

import pyarrow as pa
import torch
from torch import Tensor

from lrpq.model.host_memory import release_freed_memory
from lrpq.model.linears import EXPERTS
from lrpq.model.streaming import BlockStream
from lrpq.quant.hessian import merge
from lrpq.quant.matched_curvature import bounded_sum
from lrpq.refine.routed import POOLED
from lrpq.relevance.outputs import CHUNK_ROWS
from lrpq.relevance.sweep import BlockSums, SiteWeights, merge_block_sums, on_host
from lrpq.shards import Node, root
from tasks.device_copies import added, now, to_host
from tasks.hessian_bands import FIRST, REST, SECOND
from tasks.profile_job import HESSIANS, INPUTS, ROWS, SQUARES, TRACE, ProfileJob, chunk_name
from tasks.store.host_threads import begun, made
from tasks.store.objects import ObjectStore
from tasks.store.opened import open_store
from tasks.store.symmetric import write_symmetric
from tasks.store.tables import write_table
from tasks.store.tensors import write_tensors
from tasks.streams import shard_slices
from tasks.upper_triangle import WHOLE, Band, Sum, Triangle, UpperTriangle, packed
from tasks.worker import WorkerState

PARTS = "parts"
"""Under which a worker keeps its sums until they are stored or taken, by block and share."""
BANDS, OUTPUTS = "bands", "outputs"
"""Shares of a block's sums beside HESSIANS, each stored by another worker where there are so many: the Hessians of its
sites, second bands of wide ones (tasks.hessian_bands), and the rest."""
SCORE_UNITS = {"value": "as named in the column unit"}
Part = tuple[dict[Node, BlockSums], dict[int, SiteWeights]]
"""What one worker finds of a block."""


def shared_out(
    state: WorkerState, job: ProfileJob, block: int, sums: Mapping[Node, BlockSums], weights: Mapping[int, SiteWeights]
) -> dict[str, Future[Part]]:
    """A worker's sums of a block by share, in host memory; from a GPU, but in low memory, on their way there, one share
    after the other, while it goes on: meanwhile it holds what is sent of them."""
    cut = job.cut_of(block)
    of_share = {share: dict(weights) if share == OUTPUTS else {} for share in shares(job, block)}
    if state.device != "cpu" and not state.low_memory:
        whole = [({node: _of_share(of, share, cut) for node, of in sums.items()}, w) for share, w in of_share.items()]
        copy = partial(to_host, after=now(state.device))
        coming = begun(partial(_brought, deque([part]), copy) for part in whole)
        return dict(zip(of_share, coming, strict=True))
    found: dict[str, Future[Part]] = {}
    stays = state.num_workers == 1 and state.device == "cpu"  # nothing is copied, so that nothing is in memory twice
    for share, own in of_share.items():
        parts = {node: _of_share(of, share, cut, stays=stays, copy=to_host) for node, of in sums.items()}
        found[share] = made((parts, own))
    return found


def _brought(part: deque[Part], copy: Callable[[Tensor], Tensor]) -> Part:
    """A part in host memory; what it was made of is given up one after the other."""
    sums, weights = part.pop()
    return {node: on_host(sums.pop(node), copy) for node in list(sums)}, weights


def shares(job: ProfileJob, block: int) -> tuple[str, ...]:
    """Shares that a block's sums are stored in, in the order in which workers take turns.

    Of three the largest is in the middle, so that of two workers one has nothing else: of a 70B block's 2.86 GB both
    have 1.43 (docs/adr/0025-hessians-in-two-objects.md).
    """
    if not job.weighs_tokens:
        return (OUTPUTS,)
    return (BANDS, HESSIANS, OUTPUTS) if job.cut_of(block) else (HESSIANS, OUTPUTS)


def _of_share(
    sums: BlockSums,
    share: str,
    cut: frozenset[str],
    *,
    stays: bool = False,
    copy: Callable[[Tensor], Tensor] = lambda values: values,
) -> BlockSums:
    """A share of a worker's sums, where ``copy`` brings them; unless they stay, upper triangles or bands of them."""
    if share == OUTPUTS:
        rest = replace(sums, hessians={})
        return on_host(rest, copy) if stays else sent_sums(rest, copy)
    is_first = share == HESSIANS
    whole = {site: H for site, H in sums.hessians.items() if site not in cut and is_first}
    bands = {site: H for site, H in sums.hessians.items() if site in cut}
    alone = replace(sums, hessians=whole, curvature={}, traces={}, outputs={})
    found = on_host(alone, copy) if stays else sent_sums(alone, copy)
    hessians = dict(found.hessians)
    for site, H in bands.items():
        xx = H.xx if stays else packed(H.xx, FIRST if is_first else SECOND)
        x = copy(H.x) if H.x is not None and is_first else None
        hessians[site] = replace(H, xx=copy(xx), x=x)
    return replace(found, hessians=hessians)


def sent_sums(sums: BlockSums, copy: Callable[[Tensor], Tensor] = to_host) -> BlockSums:
    """A worker's sums where ``copy`` brings them, of matrices the upper triangles: half the bytes to copy, send and add
    up."""
    return on_host(sums, lambda values: copy(packed(values) if values.ndim == 2 else values))


def stored_matrix(values: Tensor, band: Band = WHOLE) -> Tensor | Triangle:
    """A matrix of sums as it is stored, of which a band may have been packed."""
    return values.cpu() if values.ndim == 2 else UpperTriangle(values, band)


def sums_bytes(stream: BlockStream, block: int) -> int:
    """Bytes of a block's sums, float32 and dense; about half of it is sent and stored."""
    hessians = sum(members[0].d_in ** 2 for members in stream.sites(block).values())
    outputs = sum(spec.d_out * min(spec.d_out, CHUNK_ROWS) for spec in stream.block_specs(block) if not spec.routed)
    return 4 * (hessians + outputs)


def storing_workers(job: ProfileJob, block: int, num_workers: int) -> dict[str, int]:
    """Share of a block's sums -> by whom it is merged with those of the others and stored."""
    return {share: (block + i) % num_workers for i, share in enumerate(shares(job, block))}


def store_share(state: WorkerState, job: ProfileJob, block: int, share: str, kept: None, *others: Part) -> None:
    """Merge the workers' sums of a block and store them.

    Args:
        state: the worker, which has kept its own.
        job: the stage.
        block: index of the block.
        share: which of the sums.
        kept: result of this worker's ``backward``, waited for.
        others: of the other workers.
    """
    held: dict[tuple[int, str], Future[Part]] = state.held[PARTS]
    nodes, weights = held.pop((block, share)).result()
    for sums, shard_weights in others:
        nodes |= sums
        weights |= shard_weights
    store = open_store(job.stream.store)
    if share == HESSIANS:
        _write_hessians(store, job, block, nodes)
    elif share == BANDS:
        write_hessians(store, job, block, nodes, kind=REST, bands=dict.fromkeys(job.cut_of(block), SECOND))
    else:
        _write_outputs(store, job, block, nodes, weights)
    del nodes, others
    mine = [s for s, storer in storing_workers(job, block, state.num_workers).items() if storer == state.index]
    if share == mine[-1]:  # once a block: it computes meanwhile, in fresh pages
        release_freed_memory()


def _write_hessians(store: ObjectStore, job: ProfileJob, block: int, nodes: Mapping[Node, BlockSums]) -> None:
    """Where tokens are weighed; profile_inputs.py stores plain ones."""
    merged = write_hessians(store, job, block, nodes, bands=dict.fromkeys(job.cut_of(block), FIRST))
    if not job.for_activations:
        return
    sums: dict[str, Tensor] = {}
    for site, hessian in merged.hessians.items():
        if hessian.x is None:
            raise RuntimeError(f"block {block}, {site}: the sum of the inputs was not kept")
        sums[site] = hessian.x.cpu()
    write_tensors(store, job.folder.block(INPUTS, block, "safetensors"), sums, {})


def _write_outputs(
    store: ObjectStore,
    job: ProfileJob,
    block: int,
    nodes: Mapping[Node, BlockSums],
    weights: Mapping[int, SiteWeights],
) -> None:
    """Curvature and scores, and where tokens are weighed their weights and the outputs."""
    merged = _without_matrices(nodes, job.stream.num_shards)
    curvature = _write_curvature(store, job, block, merged)
    tokens: dict[str, Tensor] = {}
    if job.weighs_tokens:
        tokens = _write_token_weights(store, job, block, weights)
        chunks = [(name, i) for name, found in next(iter(nodes.values())).outputs.items() for i in range(len(found))]
        write_symmetric(
            store,
            job.folder.block("outputs", block, "parquet"),
            {
                chunk_name(name, i): _stored_sum({at: sums.outputs[name][i] for at, sums in nodes.items()}, job)
                for name, i in chunks
            },
        )
    if job.for_activations:
        in_order = [weights[i].squares for i in sorted(weights)]
        squares = {site: torch.cat([part[site] for part in in_order]) for site in in_order[0]}
        write_tensors(store, job.folder.block(SQUARES, block, "safetensors"), squares, {})
    write_table(
        store,
        job.folder.block("scores", block, "parquet"),
        score_table(block, curvature, tokens),
        units=SCORE_UNITS,
        kind="scores",
    )


def store_head(state: WorkerState, job: ProfileJob, block: int, *parts: dict[Node, BlockSums]) -> dict[str, float]:
    """Merge the workers' sums of the head and store them as those of the block behind the last one.

    Returns:
        Module name -> output curvature summed over its outputs, nats per unit of output squared.
    """
    nodes: dict[Node, BlockSums] = {}
    for sums in parts:
        nodes |= sums
    merged = write_hessians(open_store(job.stream.store), job, block, nodes)
    curvature = _write_curvature(open_store(job.stream.store), job, block, merged)
    return {name: float(c.sum()) for name, c in curvature.items()}


def write_hessians(
    store: ObjectStore,
    job: ProfileJob,
    block: int,
    nodes: Mapping[Node, BlockSums],
    *,
    kind: str = HESSIANS,
    bands: Mapping[str, Band] | None = None,
) -> BlockSums:
    """Merge and store the sums of every site, and of all experts together; of some sites a band.

    Returns:
        The merged sums without their matrices.
    """
    merged = _without_matrices(nodes, job.stream.num_shards)
    total, bands = merged.num_tokens, bands or {}
    matrices = {
        site: _stored_sum({at: sums.hessians[site].xx for at, sums in nodes.items()}, job, bands.get(site, WHOLE))
        for site in merged.hessians
    }
    hessians = dict(merged.hessians)
    if experts := [site for site in hessians if site.startswith(f"{EXPERTS}.") and site.endswith(".gate_up")]:
        # all experts' gate and up projections read the same; a dense block has none
        hessians[POOLED] = reduce(merge, (hessians[site] for site in experts))
        matrices[POOLED] = reduce(_plus, (matrices[site] for site in experts))
    write_symmetric(
        store,
        job.folder.block(kind, block, "parquet"),
        matrices,
        {s: {"weight_sum": h.weight_sum, "num_tokens": h.num_tokens, "total": total} for s, h in hessians.items()},
        bands=bands,
    )
    return merged


def _without_matrices(nodes: Mapping[Node, BlockSums], num_shards: int) -> BlockSums:
    """All but the matrices, merged."""
    bare = {
        node: replace(sums, hessians={s: replace(H, xx=H.xx[:0]) for s, H in sums.hessians.items()}, outputs={})
        for node, sums in nodes.items()
    }
    return root(bare, num_shards, merge_block_sums)


def _stored_sum(parts: Mapping[Node, Tensor], job: ProfileJob, band: Band = WHOLE) -> Tensor | Triangle:
    """A matrix merged in the fixed tree, as it is stored: of upper triangles what adds them up where it is read."""
    return root({node: stored_matrix(part, band) for node, part in parts.items()}, job.stream.num_shards, _plus)


def _plus(left: Tensor | Triangle, right: Tensor | Triangle) -> Tensor | Triangle:
    """Squares, of which the head's are some, are added up here."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return added(left, right)
    if isinstance(left, Triangle) and isinstance(right, Triangle):
        return Sum(left, right)
    raise TypeError("a matrix and an upper triangle have no sum")


def _write_curvature(store: ObjectStore, job: ProfileJob, block: int, merged: BlockSums) -> dict[str, Tensor]:
    """Store the curvature and return it: nats per unit of output squared, a mean over the tokens with gradients; beside
    it the trace of every module's Fisher information, no window counting for far more than the others."""
    curvature = {name: g2 / merged.num_explained for name, g2 in merged.curvature.items()}
    traces = {n + TRACE: bounded_sum(t).view(1) / merged.num_explained for n, t in merged.traces.items()}
    write_tensors(store, job.folder.block("curvature", block, "safetensors"), curvature | traces, {})
    return curvature


def _write_token_weights(
    store: ObjectStore, job: ProfileJob, block: int, weights: Mapping[int, SiteWeights]
) -> dict[str, Tensor]:
    """Store the token weights of all shards; returns what is stored."""
    stream = job.stream
    tokens = _token_weights(weights, total_tokens=stream.num_tokens, num_shards=stream.num_shards, length=stream.length)
    write_tensors(store, job.folder.block("token-weights", block, "safetensors"), tokens, {})
    return tokens


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
