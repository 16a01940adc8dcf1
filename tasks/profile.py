"""Profile: relevance of every token and output, and the Hessian of every input site, weighted by relevance or plain.

Workers stream all blocks forward and backward for their shards. A block's sums are merged in the fixed tree and stored
as soon as every worker has gone through it, so memory holds the sums of the block at hand only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from lrpq.errors import StoreError
from lrpq.model.host_memory import release_freed_memory
from lrpq.model.kept import KeptInputs
from lrpq.model.layers import LinearSpec
from lrpq.model.linears import EXPERTS
from lrpq.quant.hessian import HessianSum, merge
from lrpq.refine.routed import POOLED
from lrpq.relevance.composite import Relevance
from lrpq.relevance.outputs import CHUNK_ROWS, Outputs, num_chunks
from lrpq.relevance.partial import PartialSweep
from lrpq.relevance.rules import Pass
from lrpq.relevance.sweep import BlockSums, ProfileSweep, SiteWeights, merge_block_sums, on_host
from lrpq.shards import Node, root
from tasks.artifacts import StageFolder
from tasks.chosen_grids import folding_at
from tasks.device_copies import added, to_host
from tasks.hessian_bands import FIRST, REST, SECOND
from tasks.store.objects import ObjectStore
from tasks.store.opened import open_store
from tasks.store.symmetric import read_symmetric, write_symmetric
from tasks.store.tables import write_table
from tasks.store.tensors import read_tensors, write_tensors
from tasks.streams import StreamJob, my_shards, open_copies, open_stream, shard_slices
from tasks.upper_triangle import WHOLE, Band, Sum, Triangle, UpperTriangle, packed
from tasks.waypoints import (
    blocks_with_waypoint,
    is_waypoint,
    read_waypoint,
    read_waypoint_metadata,
    write_waypoint,
)
from tasks.worker import WorkerState

STAGE = "profile"
PARTS = "parts"
"""Under which a worker keeps its sums until they are stored or taken, by block and share."""
GRADIENTS = "gradients"
"""Under which it keeps gradients in host memory until they are stored, by block."""
ROWS = ".rows"
"""Ending of the name under which an expert's token indices lie beside its token weights."""
BLOCK_OBJECTS = (
    ("hessians", "parquet"),
    ("curvature", "safetensors"),
    ("scores", "parquet"),
    ("outputs", "parquet"),
    ("token-weights", "safetensors"),
)
"""Kind and ending of what is stored of a block."""
PLAIN_OBJECTS = BLOCK_OBJECTS[:3]
"""Of these what there is where tokens are not weighed."""
HEAD_OBJECTS = BLOCK_OBJECTS[:2]
SQUARES, INPUTS = "squared-gradients", "inputs"
ACTIVATION_OBJECTS = ((SQUARES, "safetensors"), (INPUTS, "safetensors"))
"""What there is besides where activations are to be quantized: squared gradients by site and token, and by site the
weighted sum of its inputs."""
HESSIANS, BANDS, OUTPUTS = "hessians", "bands", "outputs"
"""Shares of a block's sums, each stored by another worker where there are so many: the Hessians of its sites, second
bands of wide ones (tasks.hessian_bands), and the rest."""
FORWARD, BACKWARD = "forward", "backward"
"""Kinds of waypoints."""
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
    gradients_every: int = 1
    """Of how many windows one has its gradients taken; above 1 Hessians are plain and summed on the way forward
    (tasks.profile_inputs)."""
    cut: frozenset[tuple[int, str]] = frozenset()
    """(block, input site) of the sites whose Hessians are in two objects (tasks.hessian_bands)."""
    for_activations: bool = False
    """Also what quantizing activations needs. The walk is on the model as it was; with a ``stream`` whose activations
    have grids, Hessians are read as those of the model that is folded for them."""

    @property
    def weighs_tokens(self) -> bool:
        """Whether tokens are weighed by their gradients; otherwise gradients give the curvature alone."""
        return self.gradients_every == 1

    def block_objects(self, block: int) -> tuple[tuple[str, str], ...]:
        """Kind and ending of what is stored of a block."""
        if not self.weighs_tokens:
            return PLAIN_OBJECTS
        rest = ((REST, "parquet"),) if self.cut_of(block) else ()
        return BLOCK_OBJECTS + rest + (ACTIVATION_OBJECTS if self.for_activations else ())

    def cut_of(self, block: int) -> frozenset[str]:
        """Input sites of a block whose Hessians are in two objects: of plain ones none."""
        return frozenset(site for of, site in self.cut if of == block) if self.weighs_tokens else frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Where a profile begins or goes on."""

    backward: bool
    """Whether the forward sweep and the labels are done."""
    block: int
    """Forward: the block that comes first. Backward: gradients at the input of this block are known."""
    stored: frozenset[int]
    """Blocks whose sums are stored; the head's count as the block behind the last one."""


def position(job: ProfileJob, *, num_blocks: int) -> Position:
    """How far the store says that the profile has come."""
    store = open_store(job.stream.store)
    present = set(store.list(job.folder.prefix))
    names = [
        *((b, job.block_objects(b)) for b in range(num_blocks)),
        *([(num_blocks, HEAD_OBJECTS)] if job.with_head else []),
    ]
    stored = frozenset(b for b, kinds in names if all(job.folder.block(*_name(kind, b)) in present for kind in kinds))
    lowest = num_blocks  # of the blocks that are stored without a gap from the last one down
    while lowest - 1 in stored:
        lowest -= 1
    known = blocks_with_waypoint(store, job.folder, BACKWARD, job.stream.num_shards)
    usable = [block for block in known if block >= lowest]
    if usable and (not job.with_head or num_blocks in stored):
        return Position(backward=True, block=usable[0], stored=stored)
    forwards = blocks_with_waypoint(store, job.folder, FORWARD, job.stream.num_shards)
    return Position(backward=False, block=forwards[-1] if forwards else 0, stored=stored)


def _name(kind: tuple[str, str], block: int) -> tuple[str, int, str]:
    return kind[0], block, kind[1]


def begin(state: WorkerState, job: ProfileJob, start: Position) -> None:
    """Open the model and bring this worker's shards to where the profile begins or goes on."""
    state.held[PARTS], state.held[GRADIENTS] = {}, {}  # an attempt before this one may have left some
    sweep = _sweep(state, job)
    stream = sweep.stream
    sweep.on_batch = state.beat
    sweep.embed()  # also where a waypoint follows: it records what blocks are called with
    state.held[STAGE] = sweep
    if start.backward:
        sweep.hidden.clear()
        _load_gradients(job, sweep, start.block)
        state.held["blocks"] = stream.stream(range(start.block - 1, -1, -1))
        return
    if start.block:
        _load_hidden(job, sweep, start.block)
    back = range(stream.num_blocks - 1, -1, -1)  # the last block stays for both ways
    state.held["blocks"] = stream.stream([*range(start.block, stream.num_blocks), *back])


def _sweep(state: WorkerState, job: ProfileJob) -> ProfileSweep:
    common: dict[str, Any] = {
        "num_shards": job.stream.num_shards,
        "seed": job.seed,
        "micro_batch": job.stream.micro_batch,
        "kept": KeptInputs(memory_bytes=state.kept_bytes, folder=state.spill_folder, may_forget=True),
        "with_head": job.with_head,
        "low_memory": open_copies(state),
    }
    stream, shards = open_stream(state, job.stream), my_shards(state, job.stream)
    if not job.weighs_tokens:
        return PartialSweep(stream, shards, gradients_every=job.gradients_every, **common)
    weights: dict[str, Any] = {"relevance": Relevance(job.relevance), "floor": job.floor, "power": job.power}
    return ProfileSweep(stream, shards, for_activations=job.for_activations, **weights, **common)


def forward(state: WorkerState, job: ProfileJob, block: int) -> None:
    """One block of the forward sweep."""
    sweep, module = enter_forward(state, job, block)
    sweep.forward(block, module)


def enter_forward(state: WorkerState, job: ProfileJob, block: int) -> tuple[ProfileSweep, nn.Module]:
    """The sweep, and the block that comes next in it with its weights; waypoints are stored here."""
    sweep: ProfileSweep = state.held[STAGE]
    if is_waypoint(block, sweep.stream.num_blocks):
        shards: dict[int, dict[str, Tensor]] = {}
        for (shard, batch), hidden in sweep.hidden.items():
            shards.setdefault(shard, {})[_batch(batch)] = to_host(hidden)
        write_waypoint(open_store(job.stream.store), job.folder, FORWARD, block, shards)
    index, module = next(state.held["blocks"])
    if index != block:
        raise RuntimeError(f"forward sweep is at block {index}, asked for {block}")
    return sweep, module


def seed_gradients(state: WorkerState, job: ProfileJob) -> None:
    """Sampled labels and their gradients at the last block."""
    sweep: ProfileSweep = state.held[STAGE]
    sweep.seed_gradients()


def take_head(state: WorkerState) -> dict[Node, BlockSums]:
    """Sums of the head for this worker's shards, and forget them."""
    sweep: ProfileSweep = state.held[STAGE]
    found, sweep.head_sums = sweep.head_sums, {}
    return {node: on_host(sums, to_host) for node, sums in found.items()}


def keep_gradients(state: WorkerState, job: ProfileJob, block: int) -> None:
    """Copy the gradients at the input of a block to host memory, with the losses of the labels they come from; there
    ``store_gradients`` finds them."""
    sweep: ProfileSweep = state.held[STAGE]
    shards: dict[int, dict[str, Tensor]] = {
        shard.index: {} for shard in sweep.shards
    }  # of some, no gradients are taken
    for (shard, batch), gradients in sweep.upstream.items():
        shards[shard].update({_batch(batch, kind): to_host(g) for kind, g in gradients.items()})
    losses = {shard: {"nats": nats.hex(), "tokens": str(tokens)} for shard, (nats, tokens) in sweep.losses.items()}
    state.held[GRADIENTS][block] = shards, losses


def store_gradients(state: WorkerState, job: ProfileJob, block: int, kept: None) -> None:
    """Store what ``keep_gradients`` has kept, beside what is computed next; ``kept`` is its result, waited for."""
    shards, losses = state.held[GRADIENTS].pop(block)
    write_waypoint(open_store(job.stream.store), job.folder, BACKWARD, block, shards, losses)


def losses(job: ProfileJob, *, num_blocks: int) -> tuple[float, int]:
    """Summed loss of the sampled labels, nats, and their number: by shard, so that workers do not matter."""
    shards = range(job.stream.num_shards)
    found = read_waypoint_metadata(open_store(job.stream.store), job.folder, BACKWARD, num_blocks, shards)
    nats = sum(float.fromhex(found[shard]["nats"]) for shard in shards)
    return nats, sum(int(found[shard]["tokens"]) for shard in shards)


Part = tuple[dict[Node, BlockSums], dict[int, SiteWeights]]
"""What one worker finds of a block."""


def backward(state: WorkerState, job: ProfileJob, block: int) -> None:
    """One block of the backward sweep; see ProfileSweep.backward. Sums are kept in host memory, by share, until they
    are stored here or taken."""
    sums, weights = _backward(state, job, block)
    stays = state.num_workers == 1 and state.device == "cpu"  # nothing is copied, so that nothing is in memory twice
    parts: dict[tuple[int, str], Part] = state.held[PARTS]
    for share in shares(job, block):
        found = {node: _of_share(found, share, job.cut_of(block), stays=stays) for node, found in sums.items()}
        parts[block, share] = found, weights if share == OUTPUTS else {}


def shares(job: ProfileJob, block: int) -> tuple[str, ...]:
    """Shares that a block's sums are stored in, in the order in which workers take turns.

    Of three the largest is in the middle, so that of two workers one has nothing else: of a 70B block's 2.86 GB both
    have 1.43 (docs/adr/0025-hessians-in-two-objects.md).
    """
    if not job.weighs_tokens:
        return (OUTPUTS,)
    return (BANDS, HESSIANS, OUTPUTS) if job.cut_of(block) else (HESSIANS, OUTPUTS)


def _of_share(sums: BlockSums, share: str, cut: frozenset[str], *, stays: bool) -> BlockSums:
    """A share of a worker's sums, in host memory; those that are sent as upper triangles or bands of them."""
    if share == OUTPUTS:
        rest = replace(sums, hessians={})
        return on_host(rest, to_host) if stays else sent_sums(rest)
    is_first = share == HESSIANS
    whole = {site: H for site, H in sums.hessians.items() if site not in cut and is_first}
    bands = {site: H for site, H in sums.hessians.items() if site in cut}
    alone = replace(sums, hessians=whole, curvature={}, outputs={})
    found = on_host(alone, to_host) if stays else sent_sums(alone)
    hessians = dict(found.hessians)
    for site, H in bands.items():
        xx = H.xx if stays else packed(H.xx, FIRST if is_first else SECOND)
        x = to_host(H.x) if H.x is not None and is_first else None
        hessians[site] = replace(H, xx=to_host(xx), x=x)
    return replace(found, hessians=hessians)


def take(state: WorkerState, block: int, share: str) -> Part:
    """A share of this worker's sums of a block, for the one that stores it; they are forgotten here."""
    part: Part = state.held[PARTS].pop((block, share))
    return part


def sent_sums(sums: BlockSums) -> BlockSums:
    """A worker's sums in host memory, of matrices the upper triangles: half the bytes to copy, send and add up."""
    return on_host(sums, lambda values: to_host(packed(values) if values.ndim == 2 else values))


def stored_matrix(values: Tensor, band: Band = WHOLE) -> Tensor | Triangle:
    """A matrix of sums as it is stored, of which a band may have been packed."""
    return values.cpu() if values.ndim == 2 else UpperTriangle(values, band)


def storing_workers(job: ProfileJob, block: int, num_workers: int) -> dict[str, int]:
    """Share of a block's sums -> by whom it is merged with those of the others and stored."""
    return {share: (block + i) % num_workers for i, share in enumerate(shares(job, block))}


def _backward(state: WorkerState, job: ProfileJob, block: int) -> Part:
    sweep: ProfileSweep = state.held[STAGE]
    index, module = next(state.held["blocks"])
    if index != block:
        raise RuntimeError(f"backward sweep is at block {index}, asked for {block}")
    if sweep.lacks_inputs(block):
        _repeat_forward(job, sweep, block, module)
    return sweep.backward(block, module)


def pass_backward(state: WorkerState, job: ProfileJob, block: int) -> None:
    """As ``backward``, where only the gradients are missing: the block's sums are stored already."""
    _backward(state, job, block)


def end(state: WorkerState) -> dict[str, int]:
    """Free what the stage holds; returns what was spilled, and what had to be computed twice for want of room."""
    state.held.pop("blocks").close()
    sweep: ProfileSweep = state.held.pop(STAGE)
    with sweep.kept as inputs:
        kept = {"spilled_bytes": inputs.spilled_bytes, "forgotten_bytes": inputs.forgotten_bytes}
    state.held.pop(PARTS)
    state.held.pop(GRADIENTS)
    state.close_copies()
    return kept


def _batch(batch: int, kind: Pass | None = None) -> str:
    """Name of a micro-batch's tensor in a waypoint."""
    return f"{batch:05d}" if kind is None else f"{batch:05d}|{kind.value}"


def _load_hidden(job: ProfileJob, sweep: ProfileSweep, block: int) -> None:
    shards = [shard.index for shard in sweep.shards]
    found = read_waypoint(open_store(job.stream.store), job.folder, FORWARD, block, shards)
    for shard, tensors in found.items():
        for name, hidden in tensors.items():
            sweep.hidden[shard, int(name)] = hidden.to(sweep.stream.device)


def _load_gradients(job: ProfileJob, sweep: ProfileSweep, block: int) -> None:
    store, shards = open_store(job.stream.store), [shard.index for shard in sweep.shards]
    for shard, tensors in read_waypoint(store, job.folder, BACKWARD, block, shards).items():
        found: dict[int, dict[Pass, Tensor]] = {}
        for name, gradient in tensors.items():
            batch, _, kind = name.partition("|")
            found.setdefault(int(batch), {})[Pass(kind)] = gradient.to(sweep.stream.device)
        for number, gradients in found.items():
            sweep.upstream[shard, number] = {kind: gradients[kind] for kind in sweep.passes}
    for shard, entry in read_waypoint_metadata(store, job.folder, BACKWARD, block, shards).items():
        sweep.losses[shard] = (float.fromhex(entry["nats"]), int(entry["tokens"]))


def _repeat_forward(job: ProfileJob, sweep: ProfileSweep, block: int, module: nn.Module) -> None:
    """Compute inputs that are not kept again, from the nearest waypoint on; ``module`` is the block with its weights.

    Raises:
        StoreError: there is no room for them, neither in memory nor on disk.
    """
    known = blocks_with_waypoint(open_store(job.stream.store), job.folder, FORWARD, job.stream.num_shards)
    first = max((b for b in known if b <= block), default=0)
    sweep.kept.forget_before(first)
    if first:
        _load_hidden(job, sweep, first)
    else:
        sweep.embed()
    for index, before in sweep.stream.stream(range(first, block)):
        sweep.forward(index, before)
    sweep.forward(block, module)
    sweep.hidden.clear()
    if sweep.lacks_inputs(block):
        raise StoreError(
            f"block {block}: no room for the inputs of {block + 1 - first} blocks in memory or on disk; make room in "
            f"{sweep.kept.folder}, or name another spill_folder (or more kept_bytes) in [cluster] of the configuration"
        )


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
    held: dict[tuple[int, str], Part] = state.held[PARTS]
    nodes, weights = held.pop((block, share))
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
    if not any(of_block == block for of_block, _ in list(held)):  # once a block: it computes meanwhile, in fresh pages
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
                _chunk(name, i): _stored_sum({at: sums.outputs[name][i] for at, sums in nodes.items()}, job)
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
    """Store the curvature and return it: nats per unit of output squared, a mean over the tokens with gradients."""
    curvature = {name: g2 / merged.num_explained for name, g2 in merged.curvature.items()}
    write_tensors(store, job.folder.block("curvature", block, "safetensors"), curvature, {})
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


def stored_curvature(job: ProfileJob, blocks: Iterable[int]) -> dict[str, float]:
    """Module name -> output curvature summed over its outputs, nats per unit of output squared, of stored blocks."""
    store = open_store(job.stream.store)
    return {
        name: float(c.sum())
        for block in blocks
        for name, c in read_tensors(store, job.folder.block("curvature", block, "safetensors")).items()
    }


def read_hessian(job: ProfileJob, block: int, site: str) -> tuple[HessianSum, int]:
    """Hessian sums of one site of the model that ``job.stream`` names, folded or not, and the calibration tokens of the
    run (an expert saw fewer). As where they are added up, the upper triangle is filled."""
    store = open_store(job.stream.store)
    folding = None if job.stream.activations is None else folding_at(job.stream.activations, block, site)
    key, rest = (job.folder.block(kind, block, "parquet") for kind in (HESSIANS, REST))
    others = (rest,) if site in job.cut_of(block) else ()
    xx, scalars = read_symmetric(store, key, site, lower=folding is not None, rest=others)
    sums = HessianSum(xx=xx, weight_sum=scalars["weight_sum"], num_tokens=int(scalars["num_tokens"]))
    if folding is not None:
        inputs = read_tensors(store, job.folder.block(INPUTS, block, "safetensors"), [site])
        sums = folding.of_hessian(replace(sums, x=inputs[site]))
    return sums, int(scalars["total"])


def read_curvature(job: ProfileJob, block: int, names: list[str]) -> dict[str, Tensor]:
    """Output curvature c [d_out] (float64) of some modules of a block."""
    return read_tensors(open_store(job.stream.store), job.folder.block("curvature", block, "safetensors"), names)


def read_outputs(store: ObjectStore, folder: StageFolder, spec: LinearSpec, rows: slice | None = None) -> Outputs:
    """Second moments of the gradients at a module's outputs (lrpq/relevance/outputs.py), in the unit of their sum; of
    the chunks that begin in some rows."""
    key = folder.block("outputs", spec.block, "parquet")
    rows = slice(0, spec.d_out) if rows is None else rows
    chunks = [i for i in range(num_chunks(spec.d_out)) if rows.start <= i * CHUNK_ROWS < rows.stop]
    return [read_symmetric(store, key, _chunk(spec.name, i))[0] for i in chunks]


def _chunk(name: str, index: int) -> str:
    return f"{name}|{index}"
