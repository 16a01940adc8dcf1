"""Candidates: every module at every choice of (bits, group size), and what each would cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import torch

from lrpq.model.experts import GATE_UP
from lrpq.model.layers import HEAD, Choice, LinearSpec
from lrpq.quant.factor import factorize
from lrpq.quant.gptq import gptq, predicted_cost
from lrpq.quant.grid import Grid, QuantizedWeight
from lrpq.quant.hessian import HessianSum, normalized
from lrpq.quant.packing import pack, storage_bits, unpack
from lrpq.quant.starved import Evidence, hessian_of_expert, is_starved
from lrpq.refine.routed import POOLED
from lrpq.relevance.weights import has_relevance
from tasks.artifacts import StageFolder
from tasks.profile import ProfileJob, read_curvature, read_hessian
from tasks.store.objects import ObjectStore
from tasks.store.opened import open_store
from tasks.store.tables import read_table, write_table
from tasks.store.tensors import read_tensors, write_tensors
from tasks.streams import held_source
from tasks.worker import WorkerState

STAGE = "candidates"
COST_UNITS = {
    "cost_nats": "nats per token",
    "storage_bits": "bits",
    "damping_steps": "1",
    "dead_inputs": "1",
    "evidence": "own, unweighted, pooled or none",
    "bits": "bits per code",
    "group_size": "columns per scale, -1 is all",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidatesJob:
    """Parameters of the stage; the same on every worker."""

    profile: ProfileJob
    folder: StageFolder
    choices: tuple[Choice, ...]
    damping: float
    """Share of the mean diagonal that is added to it."""
    grid: str
    """``signed`` or ``symmetric``, see quant/grid.py."""
    head: Choice | None = None
    """The head's one choice; None leaves it as it is."""


def quantize_site(state: WorkerState, job: CandidatesJob, block: int, site: str, specs: tuple[LinearSpec, ...]) -> bool:
    """Quantize the modules of one site at every choice that fits and store codes and costs.

    Returns:
        Whether anything was computed: False if the site's costs (written last) and codes are in the store already.
    """
    store = open_store(job.profile.stream.store)
    costs_key, codes_key = _keys(job, block, site)
    if store.exists(costs_key) and store.exists(codes_key):
        return False
    device = torch.device(state.device)
    label = specs[0].name if specs[0].routed else specs[0].fused_group
    source = held_source(state, job.profile.stream)
    sums, evidence = _hessian(job, block, site, specs[0])
    H = normalized(replace(sums, xx=sums.xx.to(device)), name=label)
    del sums
    curvature = read_curvature(job.profile, block, [spec.name for spec in specs])
    factor = factorize(H, damping=job.damping, name=label)
    choices = _choices(job, specs[0])
    tensors: dict[str, torch.Tensor] = {}
    rows: list[dict[str, Any]] = []
    for spec in specs:
        W = source.read_rows(spec.stored).to(device, torch.float32)
        candidates = gptq(W, factor, choices, grid=Grid(job.grid), name=spec.name)
        costs = predicted_cost(W, candidates, H, curvature[spec.name].to(device))
        for candidate, cost in zip(candidates, costs, strict=True):
            tensors |= {f"{spec.name}|{candidate.choice}|{k}": v.cpu() for k, v in pack(candidate).items()}
            rows.append(
                {
                    "name": spec.name,
                    "block": block,
                    "bits": candidate.choice.bits,
                    "group_size": candidate.choice.group_size,
                    "storage_bits": storage_bits(spec.d_out, spec.d_in, candidate.choice),
                    "cost_nats": float(cost),
                    "damping_steps": factor.num_damping_steps,
                    "dead_inputs": factor.num_dead,
                    "evidence": evidence.value,
                }
            )
        state.beat()
    write_tensors(store, codes_key, tensors, {})
    write_table(store, costs_key, pa.Table.from_pylist(rows), units=COST_UNITS, kind="costs")
    return True


def _choices(job: CandidatesJob, spec: LinearSpec) -> list[Choice]:
    if spec.input_site == HEAD and job.head is not None:
        return [job.head]
    return [choice for choice in job.choices if choice.fits(spec.d_in)]


def _hessian(job: CandidatesJob, block: int, site: str, spec: LinearSpec) -> tuple[HessianSum, Evidence]:
    """The site's sums; an expert that saw too few tokens gets others', see lrpq.quant.starved."""
    own, total = read_hessian(job.profile, block, site)
    if not spec.routed:
        return own, Evidence.OWN if has_relevance(own.weight_sum, own.num_tokens) else Evidence.UNWEIGHTED
    shares_inputs = spec.kind == GATE_UP
    starved = is_starved(own.num_tokens, d_in=spec.d_in, total_tokens=total)
    pooled = read_hessian(job.profile, block, POOLED)[0] if starved and shares_inputs else None
    sums, evidence = hessian_of_expert(own, pooled, total_tokens=total)
    if evidence is Evidence.OWN and not has_relevance(own.weight_sum, own.num_tokens):
        evidence = Evidence.UNWEIGHTED
    return sums, evidence


def read_costs(job: CandidatesJob, sites: Mapping[int, list[str]]) -> list[dict[str, Any]]:
    """Cost rows of all modules, with the columns of ``COST_UNITS``."""
    store = open_store(job.profile.stream.store)
    return [
        row
        for block, names in sites.items()
        for site in names
        for row in read_table(store, job.folder.site("costs", block, site, "parquet"), "costs").to_pylist()
    ]


def read_candidate(store: ObjectStore, job: CandidatesJob, spec: LinearSpec, choice: Choice) -> QuantizedWeight:
    """Codes of one module at one choice."""
    prefix = f"{spec.name}|{choice}|"
    key = job.folder.site("codes", spec.block, spec.input_site, "safetensors")
    parts = ("weight_packed", "weight_scale", "weight_shape")
    found = read_tensors(store, key, [prefix + part for part in parts])
    return unpack({part: found[prefix + part] for part in parts}, choice)


def missing_sites(job: CandidatesJob, sites: Mapping[int, list[str]]) -> Iterator[tuple[int, str]]:
    """Sites without stored costs or codes."""
    present = set(open_store(job.profile.stream.store).list(job.folder.prefix))
    for block, names in sites.items():
        for site in names:
            if not present.issuperset(_keys(job, block, site)):
                yield block, site


def _keys(job: CandidatesJob, block: int, site: str) -> tuple[str, str]:
    """Costs and codes of a site."""
    return job.folder.site("costs", block, site, "parquet"), job.folder.site("codes", block, site, "safetensors")
