"""Candidates: what every module would cost at every choice of (bits, group size), and its codes where they are kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import torch

from lrpq.model.experts import GATE_UP
from lrpq.model.layers import HEAD, Choice, LinearSpec
from lrpq.quant.factor import Factor, factorize
from lrpq.quant.gptq import gptq, predicted_cost
from lrpq.quant.grid import Grid, QuantizedWeight
from lrpq.quant.hessian import HessianSum, normalized
from lrpq.quant.packing import pack, storage_bits, unpack
from lrpq.quant.sampled_cost import sampled_costs
from lrpq.quant.starved import Evidence, hessian_of_expert, is_starved
from lrpq.refine.routed import POOLED
from lrpq.relevance.weights import has_relevance
from tasks.artifacts import StageFolder
from tasks.device_copies import to_device, to_host
from tasks.profile import ProfileJob, read_curvature, read_hessian
from tasks.store.objects import ObjectStore
from tasks.store.opened import open_store
from tasks.store.tables import read_table, write_table
from tasks.store.tensors import read_tensors, write_tensors
from tasks.streams import read_weight
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
    cost_rows: int | None = None
    """Rows of a layer that its costs are found from, without codes (but for the head's one choice); None quantizes all
    rows at every choice, and stores the codes."""

    def keeps_codes(self, site: str) -> bool:
        """Whether the codes of a site's candidates are stored."""
        return self.cost_rows is None or site == HEAD


def quantize_site(state: WorkerState, job: CandidatesJob, block: int, site: str, specs: tuple[LinearSpec, ...]) -> bool:
    """Find the costs of one site's modules at every choice that fits and store them, behind codes where they are kept.

    Returns:
        Whether anything was computed: False if all is in the store already.
    """
    store = open_store(job.profile.stream.store)
    if all(store.exists(key) for key in _keys(job, block, site)):
        return False
    sums = site_sums(job, block, site, specs[0])
    with state.computing:
        problem = site_problem(state, job, sums, specs)
        del sums  # what is factored is another matrix
        found = (_quantized if job.keeps_codes(site) else _sampled)(state, job, problem, specs)
        rows = _rows(problem, specs, found.costs)
        del problem
    if found.codes:
        write_tensors(store, job.folder.site("codes", block, site, "safetensors"), found.codes, {})
    costs_key = job.folder.site("costs", block, site, "parquet")
    write_table(store, costs_key, pa.Table.from_pylist(rows), units=COST_UNITS, kind="costs")
    return True


def _rows(problem: SiteProblem, specs: tuple[LinearSpec, ...], costs: list[list[float]]) -> list[dict[str, Any]]:
    """A site's costs, with the columns of ``COST_UNITS``."""
    return [
        {
            "name": spec.name,
            "block": spec.block,
            "bits": choice.bits,
            "group_size": choice.group_size,
            "storage_bits": storage_bits(spec.d_out, spec.d_in, choice),
            "cost_nats": cost,
            "damping_steps": problem.factor.num_damping_steps,
            "dead_inputs": problem.factor.num_dead,
            "evidence": problem.evidence.value,
        }
        for spec, of_layer in zip(specs, costs, strict=True)
        for choice, cost in zip(problem.choices, of_layer, strict=True)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteSums:
    """A site's Hessian as the store has it, on the host."""

    hessian: HessianSum
    evidence: Evidence


def site_sums(job: CandidatesJob, block: int, site: str, spec: LinearSpec) -> SiteSums:
    """Read a site's Hessian; ``spec`` is its first layer."""
    hessian, evidence = _hessian(job, block, site, spec)
    return SiteSums(hessian=hessian, evidence=evidence)


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteProblem:
    """What the layers of a site are quantized by, on the worker's device."""

    H: torch.Tensor
    factor: Factor
    evidence: Evidence
    choices: list[Choice]
    """Those that fit."""


def site_problem(state: WorkerState, job: CandidatesJob, sums: SiteSums, specs: tuple[LinearSpec, ...]) -> SiteProblem:
    """Factor a site's Hessian, on the worker's device."""
    label = specs[0].name if specs[0].routed else specs[0].fused_group
    H = normalized(replace(sums.hessian, xx=to_device(sums.hessian.xx, state.device)), name=label)
    return SiteProblem(
        H=H,
        factor=factorize(H, damping=job.damping, name=label),
        evidence=sums.evidence,
        choices=_choices(job, specs[0]),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    costs: list[list[float]]
    """By layer and choice, nats a token."""
    codes: dict[str, torch.Tensor]
    """Packed, as they are stored."""


def _quantized(state: WorkerState, job: CandidatesJob, problem: SiteProblem, specs: tuple[LinearSpec, ...]) -> _Found:
    """All rows at every choice."""
    curvature = read_curvature(job.profile, specs[0].block, [spec.name for spec in specs])
    codes: dict[str, torch.Tensor] = {}
    costs: list[list[float]] = []
    for spec in specs:
        W = read_weight(state, job.profile.stream, spec)
        candidates = gptq(W, problem.factor, problem.choices, grid=Grid(job.grid), name=spec.name)
        costs.append(predicted_cost(W, candidates, problem.H, curvature[spec.name].to(W.device)))
        for candidate in candidates:
            codes |= {f"{spec.name}|{candidate.choice}|{k}": to_host(v) for k, v in pack(candidate).items()}
        state.beat()
    return _Found(costs=costs, codes=codes)


def _sampled(state: WorkerState, job: CandidatesJob, problem: SiteProblem, specs: tuple[LinearSpec, ...]) -> _Found:
    """Some rows at every choice."""
    assert job.cost_rows is not None
    curvature = read_curvature(job.profile, specs[0].block, [spec.name for spec in specs])
    costs = sampled_costs(
        (read_weight(state, job.profile.stream, spec) for spec in specs),
        [curvature[spec.name] for spec in specs],
        problem.factor,
        problem.choices,
        problem.H,
        num_rows=job.cost_rows,
        grid=Grid(job.grid),
        name=" + ".join(spec.name for spec in specs),
    )
    return _Found(costs=costs, codes={})


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


def _keys(job: CandidatesJob, block: int, site: str) -> tuple[str, ...]:
    """Costs and, where they are kept, codes of a site."""
    costs = job.folder.site("costs", block, site, "parquet")
    return (costs, job.folder.site("codes", block, site, "safetensors")) if job.keeps_codes(site) else (costs,)
