"""What a profile has stored, as the stages behind it read it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from lrpq.model.layers import LinearSpec
from lrpq.quant.hessian import HessianSum
from lrpq.quant.matched_curvature import matched_curvature, trace_of
from lrpq.relevance.outputs import CHUNK_ROWS, Outputs, num_chunks
from tasks.artifacts import StageFolder
from tasks.chosen_grids import folding_at
from tasks.hessian_bands import REST
from tasks.profile_job import HESSIANS, INPUTS, TRACE, ProfileJob, chunk_name
from tasks.store.objects import ObjectStore
from tasks.store.opened import open_store
from tasks.store.symmetric import read_symmetric
from tasks.store.tensors import read_tensors

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredHessian:
    """A site's sums as they were read."""

    sums: HessianSum
    """Of the model that the job names, folded or not; as where they are added up, the upper triangle is filled."""
    total_tokens: int
    """Of the run: an expert saw fewer."""
    unfolded_trace: float | None
    """tr H of the model as it was profiled, where the sums are of a folded one."""


def read_hessian(job: ProfileJob, block: int, site: str) -> StoredHessian:
    """Hessian sums of one site of the model that ``job.stream`` names."""
    store = open_store(job.stream.store)
    folding = None if job.stream.activations is None else folding_at(job.stream.activations, block, site)
    key, rest = (job.folder.block(kind, block, "parquet") for kind in (HESSIANS, REST))
    others = (rest,) if site in job.cut_of(block) else ()
    xx, scalars = read_symmetric(store, key, site, lower=folding is not None, rest=others)
    sums = HessianSum(xx=xx, weight_sum=scalars["weight_sum"], num_tokens=int(scalars["num_tokens"]))
    unfolded: float | None = None
    if folding is not None:
        unfolded = float(trace_of(sums.xx)) / sums.weight_sum if sums.weight_sum > 0 else 0.0
        inputs = read_tensors(store, job.folder.block(INPUTS, block, "safetensors"), [site])
        sums = folding.of_hessian(replace(sums, x=inputs[site]))
    return StoredHessian(sums=sums, total_tokens=int(scalars["total"]), unfolded_trace=unfolded)


def read_curvature(
    job: ProfileJob, block: int, names: list[str], hessian_trace: float
) -> dict[str, Float[Tensor, "rows=d_out"]]:
    """Curvature c (float64) of some modules of a block that read one site, matched to the trace of its H
    (lrpq/quant/matched_curvature.py)."""
    wanted = [*names, *(name + TRACE for name in names)]
    found = read_tensors(open_store(job.stream.store), job.folder.block("curvature", block, "safetensors"), wanted)
    return {name: matched_curvature(found[name], found[name + TRACE], hessian_trace) for name in names}


def read_outputs(store: ObjectStore, folder: StageFolder, spec: LinearSpec, rows: slice | None = None) -> Outputs:
    """Second moments of the gradients at a module's outputs (lrpq/relevance/outputs.py), in the unit of their sum; of
    the chunks that begin in some rows."""
    key = folder.block("outputs", spec.block, "parquet")
    rows = slice(0, spec.d_out) if rows is None else rows
    chunks = [i for i in range(num_chunks(spec.d_out)) if rows.start <= i * CHUNK_ROWS < rows.stop]
    return [read_symmetric(store, key, chunk_name(spec.name, i))[0] for i in chunks]
