"""The forward sweep of a profile whose gradients are taken on some of the windows: Hessians are summed and stored here.

A block's sums go to the store as soon as every worker has run it, so that memory holds those of the blocks at hand. The
caller waits for them before it asks for a block with a waypoint: what goes on from there finds the sums of all blocks
before it.
"""

from __future__ import annotations

from lrpq.relevance.partial import PartialSweep
from lrpq.relevance.sweep import BlockSums
from lrpq.shards import Node
from tasks.profile import enter_forward
from tasks.profile_job import ProfileJob
from tasks.profile_sums import sent_sums, write_hessians
from tasks.store.opened import open_store
from tasks.worker import WorkerState


def forward(state: WorkerState, job: ProfileJob, block: int) -> dict[Node, BlockSums]:
    """One block of the forward sweep; see PartialSweep.forward_summing."""
    sweep, module = enter_forward(state, job, block)
    if not isinstance(sweep, PartialSweep):
        raise RuntimeError("the sweep takes gradients of all windows: its Hessians are summed on the way back")
    return {node: sent_sums(sums) for node, sums in sweep.forward_summing(block, module).items()}


def store_inputs(state: WorkerState, job: ProfileJob, block: int, *parts: dict[Node, BlockSums]) -> None:
    """Merge the workers' sums of a block's inputs and store them."""
    nodes: dict[Node, BlockSums] = {}
    for sums in parts:
        nodes |= sums
    write_hessians(open_store(job.stream.store), job, block, nodes)
