"""Stitch: codes of a plan by GPTQ on the original inputs, where the candidates of the stage before are costs alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

from torch import Tensor

from lrpq.model.layers import Choice, LinearSpec
from lrpq.quant.gptq import gptq
from lrpq.quant.grid import Grid
from lrpq.quant.packing import pack
from tasks.artifacts import StageFolder
from tasks.candidates import CandidatesJob, SiteProblem, site_problem, site_sums
from tasks.store.opened import open_store
from tasks.store.tensors import write_tensors
from tasks.streams import read_weight
from tasks.worker import WorkerState

STAGE = "stitch"


@dataclass(frozen=True, slots=True, kw_only=True)
class StitchJob:
    """Parameters of the stage; the same on every worker."""

    candidates: CandidatesJob
    folder: StageFolder
    choices: Mapping[str, Choice | None]
    """Module name -> choice; None is left as it is."""

    def missing(self, specs: tuple[LinearSpec, ...]) -> tuple[LinearSpec, ...]:
        """Modules among these whose codes are wanted and not stored."""
        store = open_store(self.candidates.profile.stream.store)
        wanted = [spec for spec in specs if self.choices[spec.name] is not None]
        return tuple(spec for spec in wanted if not store.exists(self.folder.module(spec.name)))


def quantize_site(state: WorkerState, job: StitchJob, block: int, site: str, specs: tuple[LinearSpec, ...]) -> None:
    """Quantize the modules of one site, each at its choice, and store their codes, an object a module.

    They are stored as refined ones are: ``tasks.refine.read_refined`` reads them.
    """
    missing = job.missing(specs)
    if not missing:
        return
    sums = site_sums(job.candidates, block, site, missing[0])
    with state.computing:
        problem = site_problem(state, job.candidates, sums, missing)
        del sums  # what is factored is another matrix
        packed = {spec.name: _packed(state, job, problem, spec) for spec in missing}
        del problem
    store = open_store(job.candidates.profile.stream.store)
    for spec in missing:
        choice = _choice(job, spec)
        metadata = {name: str(value) for name, value in asdict(choice).items()}
        write_tensors(store, job.folder.module(spec.name), packed.pop(spec.name), metadata)


def _packed(state: WorkerState, job: StitchJob, problem: SiteProblem, spec: LinearSpec) -> dict[str, Tensor]:
    """Codes of one module at its choice, as they are stored."""
    W = read_weight(state, job.candidates.profile.stream, spec)
    (weight,) = gptq(W, problem.factor, [_choice(job, spec)], grid=Grid(job.candidates.grid), name=spec.name)
    state.beat()
    return {k: v.cpu() for k, v in pack(weight).items()}


def _choice(job: StitchJob, spec: LinearSpec) -> Choice:
    choice = job.choices[spec.name]
    if choice is None:
        raise RuntimeError(f"module {spec.name} is not quantized")
    return choice


def missing_sites(
    job: StitchJob, sites: Mapping[int, Mapping[str, tuple[LinearSpec, ...]]]
) -> Iterator[tuple[int, str]]:
    """Sites with a module whose codes are wanted and not stored."""
    present = set(open_store(job.candidates.profile.stream.store).list(job.folder.prefix))
    for block, by_site in sites.items():
        for site, specs in by_site.items():
            names = [spec.name for spec in specs if job.choices[spec.name] is not None]
            if not present.issuperset(map(job.folder.module, names)):
                yield block, site
