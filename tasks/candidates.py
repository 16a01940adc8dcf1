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
from lrpq.quant.gptq import predicted_cost
from lrpq.quant.grid import Grid, QuantizedWeight
from lrpq.quant.hessian import HessianSum, normalized
from lrpq.quant.matched_curvature import trace_of
from lrpq.quant.packing import pack, storage_bits, unpack
from lrpq.quant.sampled_cost import sampled_costs
from lrpq.quant.side_by_side import quantize_side_by_side
from lrpq.quant.starved import Evidence, hessian_of_expert, is_starved
from lrpq.refine.routed import POOLED
from lrpq.relevance.weights import has_relevance
from tasks.artifacts import StageFolder
from tasks.device_copies import to_device, to_host
from tasks.profile_job import ProfileJob
from tasks.profile_reads import StoredHessian, read_curvature, read_hessian
from tasks.site_parts import NUM_PARTS, part_of
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
    "scale_bits": "bits per scale",
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
    cut: frozenset[tuple[int, str]] = frozenset()
    """(block, input site) of the sites that are quantized in parts (tasks.site_parts)."""

    def parts(self, block: int, site: str) -> tuple[int | None, ...]:
        """Parts of a site, each a worker's task with objects of its own; None is a whole site."""
        return tuple(range(NUM_PARTS)) if (block, site) in self.cut else (None,)

    def keeps_codes(self, site: str) -> bool:
        """Whether the codes of a site's candidates are stored."""
        return self.cost_rows is None or site == HEAD


def quantize_site(
    state: WorkerState, job: CandidatesJob, block: int, site: str, part: int | None, specs: tuple[LinearSpec, ...]
) -> bool:
    """Find the costs of one site's modules at every choice that fits and store them, behind codes where they are kept.

    Args:
        state: the worker.
        job: the stage.
        block: index of the block.
        site: its input site.
        part: which of the choices, as `CandidatesJob.parts` counts them.
        specs: the site's modules.

    Returns:
        Whether anything was computed: False if all is in the store already.
    """
    store = open_store(job.profile.stream.store)
    if all(store.exists(key) for key in _keys(job, block, site, part)):
        return False
    sums = site_sums(job, block, site, specs[0])
    with state.computing:
        problem = site_problem(state, job, sums, specs, part=part)
        del sums  # what is factored is another matrix
        found = (_quantized if job.keeps_codes(site) else _sampled)(state, job, problem, specs)
        rows = _rows(problem, specs, found.costs)
        del problem
    if found.codes:
        write_tensors(store, _codes_key(job, block, site, part), found.codes, {})
    write_table(store, _costs_key(job, block, site, part), pa.Table.from_pylist(rows), units=COST_UNITS, kind="costs")
    return True


def _rows(problem: SiteProblem, specs: tuple[LinearSpec, ...], costs: list[list[float]]) -> list[dict[str, Any]]:
    """A site's costs, with the columns of ``COST_UNITS``."""
    return [
        {
            "name": spec.name,
            "block": spec.block,
            "bits": choice.bits,
            "group_size": choice.group_size,
            "scale_bits": choice.scale_bits,
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
    unfolded_trace: float | None
    """tr H of the model as it was profiled, where this one is folded."""


def site_sums(job: CandidatesJob, block: int, site: str, spec: LinearSpec) -> SiteSums:
    """Read a site's Hessian; ``spec`` is its first layer."""
    own = read_hessian(job.profile, block, site)
    hessian, evidence = _hessian(job, block, own, spec)
    return SiteSums(hessian=hessian, evidence=evidence, unfolded_trace=own.unfolded_trace)


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteProblem:
    """What the layers of a site are quantized by, on the worker's device."""

    H: torch.Tensor
    trace: float
    """tr H of the model as it was profiled."""
    factor: Factor
    evidence: Evidence
    choices: list[Choice]
    """Those that fit."""


def site_problem(
    state: WorkerState,
    job: CandidatesJob,
    sums: SiteSums,
    specs: tuple[LinearSpec, ...],
    *,
    part: int | None = None,
) -> SiteProblem:
    """Factor a site's Hessian, on the worker's device."""
    label = specs[0].name if specs[0].routed else specs[0].fused_group
    H = normalized(replace(sums.hessian, xx=to_device(sums.hessian.xx, state.device)), name=label)
    return SiteProblem(
        H=H,
        trace=float(trace_of(H)) if sums.unfolded_trace is None else sums.unfolded_trace,
        factor=factorize(H, damping=job.damping, name=label),
        evidence=sums.evidence,
        choices=part_of(_choices(job, specs[0]), part),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    costs: list[list[float]]
    """By layer and choice, nats a token."""
    codes: dict[str, torch.Tensor]
    """Packed, as they are stored."""


def _quantized(state: WorkerState, job: CandidatesJob, problem: SiteProblem, specs: tuple[LinearSpec, ...]) -> _Found:
    """All rows at every choice."""
    curvature = read_curvature(job.profile, specs[0].block, [spec.name for spec in specs], problem.trace)
    codes: dict[str, torch.Tensor] = {}
    costs: list[list[float]] = []
    layers = ((spec.name, read_weight(state, job.profile.stream, spec)) for spec in specs)
    quantized = quantize_side_by_side(layers, problem.factor, problem.choices, grid=Grid(job.grid))
    for spec, (W, candidates) in zip(specs, quantized, strict=True):
        costs.append(predicted_cost(W, candidates, problem.H, curvature[spec.name].to(W.device)))
        for candidate in candidates:
            codes |= {f"{spec.name}|{candidate.choice}|{k}": to_host(v) for k, v in pack(candidate).items()}
        state.beat()
    return _Found(costs=costs, codes=codes)


def _sampled(state: WorkerState, job: CandidatesJob, problem: SiteProblem, specs: tuple[LinearSpec, ...]) -> _Found:
    """Some rows at every choice."""
    assert job.cost_rows is not None
    curvature = read_curvature(job.profile, specs[0].block, [spec.name for spec in specs], problem.trace)
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


def _hessian(job: CandidatesJob, block: int, read: StoredHessian, spec: LinearSpec) -> tuple[HessianSum, Evidence]:
    """The site's sums; an expert that saw too few tokens gets others', see lrpq.quant.starved."""
    own, total = read.sums, read.total_tokens
    if not spec.routed:
        return own, Evidence.OWN if has_relevance(own.weight_sum, own.num_tokens) else Evidence.UNWEIGHTED
    shares_inputs = spec.kind == GATE_UP
    starved = is_starved(own.num_tokens, d_in=spec.d_in, total_tokens=total)
    pooled = read_hessian(job.profile, block, POOLED).sums if starved and shares_inputs else None
    sums, evidence = hessian_of_expert(own, pooled, total_tokens=total)
    if evidence is Evidence.OWN and not has_relevance(own.weight_sum, own.num_tokens):
        evidence = Evidence.UNWEIGHTED
    return sums, evidence


def read_costs(job: CandidatesJob, sites: Mapping[int, list[str]]) -> list[dict[str, Any]]:
    """Cost rows of all modules, with the columns of ``COST_UNITS``."""
    store = open_store(job.profile.stream.store)
    found: list[dict[str, Any]] = []
    for block, names in sites.items():
        for site in names:
            keys = [_costs_key(job, block, site, part) for part in job.parts(block, site)]
            rows = [row for key in keys for row in read_table(store, key, "costs").to_pylist()]
            order = {name: i for i, name in enumerate(dict.fromkeys(row["name"] for row in rows))}
            found += sorted(rows, key=lambda row: order[row["name"]])  # module by module, as of a whole site
    return found


def read_candidate(store: ObjectStore, job: CandidatesJob, spec: LinearSpec, choice: Choice) -> QuantizedWeight:
    """Codes of one module at one choice."""
    prefix = f"{spec.name}|{choice}|"
    parts = job.parts(spec.block, spec.input_site)
    part = next(part for part in parts if choice in part_of(_choices(job, spec), part))
    key = _codes_key(job, spec.block, spec.input_site, part)
    names = ("weight_packed", "weight_scale", "weight_shape")
    found = read_tensors(store, key, [prefix + name for name in names])
    return unpack({name: found[prefix + name] for name in names}, choice)


def missing_parts(
    job: CandidatesJob, sites: Mapping[int, Mapping[str, tuple[LinearSpec, ...]]]
) -> Iterator[tuple[int, str, int | None]]:
    """(block, site, part) without stored costs or codes; of each block those that take longest first."""
    present = set(open_store(job.profile.stream.store).list(job.folder.prefix))
    for block, found in sites.items():
        sizes = {site: _arithmetic(specs) / len(job.parts(block, site)) for site, specs in found.items()}
        for site in sorted(sizes, key=lambda site: -sizes[site]):
            for part in job.parts(block, site):
                if not present.issuperset(_keys(job, block, site, part)):
                    yield block, site, part


def _arithmetic(specs: tuple[LinearSpec, ...]) -> float:
    """That of a site, up to a factor that they have in common."""
    return sum(float(spec.d_out) * spec.d_in**2 for spec in specs)


def _keys(job: CandidatesJob, block: int, site: str, part: int | None) -> tuple[str, ...]:
    """Costs and, where they are kept, codes of a part of a site."""
    costs = _costs_key(job, block, site, part)
    return (costs, _codes_key(job, block, site, part)) if job.keeps_codes(site) else (costs,)


def _costs_key(job: CandidatesJob, block: int, site: str, part: int | None) -> str:
    return job.folder.site("costs", block, _named(site, part), "parquet")


def _codes_key(job: CandidatesJob, block: int, site: str, part: int | None) -> str:
    return job.folder.site("codes", block, _named(site, part), "safetensors")


def _named(site: str, part: int | None) -> str:
    return site if part is None else f"{site}-part-{part}"
