"""Profile: relevance of every token and output, and the Hessian of every input site, weighted by relevance or plain.

Workers stream all blocks forward and backward for their shards. A block's sums are merged in the fixed tree and stored
as soon as every worker has gone through it, so memory holds the sums of the block at hand, and what is on its way to
the store of the one before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lrpq.errors import StoreError
from lrpq.model.kept import KeptInputs
from lrpq.relevance.composite import Relevance
from lrpq.relevance.partial import PartialSweep
from lrpq.relevance.rules import Pass
from lrpq.relevance.sweep import BlockSums, ProfileSweep, on_host
from lrpq.shards import Node
from tasks.device_copies import to_host, to_host_beside
from tasks.profile_job import HEAD_OBJECTS, STAGE, TRACE, ProfileJob
from tasks.profile_sums import PARTS, Part, shared_out
from tasks.store.opened import open_store
from tasks.store.tensors import read_tensors
from tasks.streams import my_shards, open_copies, open_stream
from tasks.waypoints import (
    blocks_with_waypoint,
    is_waypoint,
    read_waypoint,
    read_waypoint_metadata,
    write_waypoint,
)
from tasks.worker import WorkerState

GRADIENTS = "gradients"
"""Under which it keeps gradients until they are stored, by block."""
FORWARD, BACKWARD = "forward", "backward"
"""Kinds of waypoints."""


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


@dataclass(frozen=True, slots=True)
class _Gradients:
    """Those at the input of a block, until they are stored."""

    copies: Future[dict[tuple[int, str], Tensor]]
    """By shard and name, in host memory or on their way there."""
    losses: Mapping[int, Mapping[str, str]]
    """Of every shard, also of one of which no gradients are taken."""


def keep_gradients(state: WorkerState, job: ProfileJob, block: int) -> None:
    """Start to copy the gradients at the input of a block to host memory, where ``store_gradients`` finds them with the
    losses of the labels they come from. The next block replaces what they are made of in the same order, and as a rule
    later than they are made: a gradient is read once, and multiplied with all weights of a block."""
    sweep: ProfileSweep = state.held[STAGE]
    found = {
        (shard, _batch(batch, kind)): to_host(g) if state.low_memory else g  # there they are copies, of the host's
        for (shard, batch), gradients in sweep.upstream.items()
        for kind, g in gradients.items()
    }
    losses = {shard: {"nats": nats.hex(), "tokens": str(tokens)} for shard, (nats, tokens) in sweep.losses.items()}
    state.held[GRADIENTS][block] = _Gradients(copies=to_host_beside(found), losses=losses)


def store_gradients(state: WorkerState, job: ProfileJob, block: int, kept: None) -> None:
    """Store what ``keep_gradients`` has kept, beside what is computed next; ``kept`` is its result, waited for."""
    found: _Gradients = state.held[GRADIENTS].pop(block)
    shards: dict[int, dict[str, Tensor]] = {shard: {} for shard in found.losses}
    for (shard, name), gradient in found.copies.result().items():
        shards[shard][name] = gradient
    write_waypoint(open_store(job.stream.store), job.folder, BACKWARD, block, shards, found.losses)


def losses(job: ProfileJob, *, num_blocks: int) -> tuple[float, int]:
    """Summed loss of the sampled labels, nats, and their number: by shard, so that workers do not matter."""
    shards = range(job.stream.num_shards)
    found = read_waypoint_metadata(open_store(job.stream.store), job.folder, BACKWARD, num_blocks, shards)
    nats = sum(float.fromhex(found[shard]["nats"]) for shard in shards)
    return nats, sum(int(found[shard]["tokens"]) for shard in shards)


def stored_curvature(job: ProfileJob, blocks: Iterable[int]) -> dict[str, float]:
    """Module name -> output curvature summed over its outputs, nats per unit of output squared, of stored blocks."""
    store = open_store(job.stream.store)
    return {
        name: float(c.sum())
        for block in blocks
        for name, c in read_tensors(store, job.folder.block("curvature", block, "safetensors")).items()
        if not name.endswith(TRACE)
    }


def backward(state: WorkerState, job: ProfileJob, block: int) -> None:
    """One block of the backward sweep; see ProfileSweep.backward. Its sums are kept, in shares."""
    sums, weights = _backward(state, job, block)
    found = shared_out(state, job, block, sums, weights)
    state.held[PARTS].update({(block, share): part for share, part in found.items()})


def take(state: WorkerState, block: int, share: str, kept: None) -> Part:
    """A share of this worker's sums of a block, for the one that stores it; they are forgotten here. ``kept`` is the
    result of ``backward``, waited for."""
    part: Future[Part] = state.held[PARTS].pop((block, share))
    return part.result()


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
