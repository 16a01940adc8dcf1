"""The jobs of a compression: the configuration's part that a stage depends on, and the key made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flows.calibrate import StoredWindows
from flows.config import CompressConfig
from flows.guard import Contender
from flows.result import choices_json
from flows.run import Run
from flows.run_config import CandidateConfig
from lrpq.allocate.parts import fixed_choice
from lrpq.allocate.plan import Plan
from lrpq.model.layers import Choice, LinearSpec, all_choices
from lrpq.transform.changed import UNCHANGED, Change
from lrpq.tune.options import Reconstruction
from tasks import activations, candidates, heat_maps, rebuild, refine, responses, stitch
from tasks.activations import ActivationsJob
from tasks.candidates import CandidatesJob
from tasks.chosen_grids import ChosenGrids
from tasks.heat_maps import HeatMapsJob
from tasks.hessian_bands import wide_sites
from tasks.profile_job import STAGE as PROFILE
from tasks.profile_job import ProfileJob
from tasks.rebuild import RebuildJob
from tasks.refine import RefineJob
from tasks.resources import shards_of
from tasks.responses import ResponsesJob
from tasks.site_parts import cut_sites
from tasks.stitch import StitchJob
from tasks.streams import StreamJob


@dataclass(frozen=True, slots=True, kw_only=True)
class JobContext:
    """What every job is made from."""

    run: Run
    config: CompressConfig
    model: Path
    """Local folder of the original."""
    fingerprint: str
    """Of the model's files, and of what changes it."""
    dtype: str
    """Of weights and activations, resolved."""
    micro_batch: int
    """Windows computed at once, resolved."""
    length: int
    """Tokens of a calibration window."""
    scale_bits: int
    """Of a group's scale, resolved."""
    change: Change = UNCHANGED
    """How the model is changed as it is read."""
    images: bool = False
    """Whether windows are images."""
    activations: ChosenGrids | None = None
    """Grids of activations, once they are known."""


def stream_job(context: JobContext, windows: StoredWindows) -> StreamJob:
    """The model, its calibration windows and their shards."""
    config = context.config.run
    return StreamJob(
        model=str(context.model),
        dtype=context.dtype,
        store=context.config.store,
        windows=windows.key,
        length=context.length,
        num_tokens=windows.num_windows * context.length,
        num_shards=shards_of(
            config.shards,
            device=context.run.device,
            num_windows=windows.num_windows,
            length=context.length,
            micro_batch=context.micro_batch,
        ),
        micro_batch=context.micro_batch,
        change=context.change,
        images=context.images,
        activations=context.activations,
    )


def profile_job(
    context: JobContext, stream: StreamJob, windows: StoredWindows, *, specs: Sequence[LinearSpec]
) -> ProfileJob:
    """Depends on the model, the windows' tokens and how relevance is computed, and on whether activations follow."""
    config = context.config.run
    with_head = config.candidates.quantize_head is not None
    for_activations = bool(config.images.activations)
    parameters = {
        "relevance": config.relevance,
        "floor": config.relevance_floor,
        "power": config.relevance_power,
        "seed": config.seed,
        **_streaming(context, stream),
        **({"head": True} if with_head else {}),
        **({"gradients_every": config.gradients_every} if config.gradients_every > 1 else {}),
        **({"activations": True} if for_activations else {}),
    }
    return ProfileJob(
        stream=stream,
        folder=context.run.folder(
            PROFILE,
            inputs={"model": context.fingerprint, "windows": windows.digest},
            parameters=parameters,
            code=["tasks.profile"] if config.gradients_every == 1 else ["tasks.profile_inputs"],
        ),
        relevance=config.relevance,
        floor=config.relevance_floor,
        power=config.relevance_power,
        seed=config.seed,
        with_head=with_head,
        gradients_every=config.gradients_every,
        cut=wide_sites(specs),
        for_activations=for_activations,
    )


def activations_job(context: JobContext, profile: ProfileJob) -> ActivationsJob:
    """Depends on the profile, and by it on the model and the images, and on the widths."""
    widths = context.config.run.images.activations
    return ActivationsJob(
        stream=profile.stream,
        folder=context.run.folder(
            activations.STAGE,
            inputs={"profile": profile.folder.key},
            parameters={"widths": list(widths)},
            code=["tasks.activations"],
        ),
        squares=profile.folder,
        widths=widths,
    )


def responses_job(context: JobContext, candidates: CandidatesJob) -> ResponsesJob:
    """Depends on the candidates' codes, and by them on the model, the images and the grids."""
    stream, seed = candidates.profile.stream, context.config.run.seed
    return ResponsesJob(
        stream=stream,
        folder=context.run.folder(
            responses.STAGE,
            inputs={"candidates": candidates.folder.key, **_activations(stream)},
            parameters={"seed": seed, **_streaming(context, stream)},
            code=["tasks.responses"],
        ),
        candidates=candidates,
        seed=seed,
    )


def heat_maps_job(context: JobContext, stream: StreamJob, windows: StoredWindows, count: int) -> HeatMapsJob:
    """Depends on the model, the images, how many of them are shown, and where relevance comes from."""
    relevance = context.config.run.relevance
    return HeatMapsJob(
        stream=stream,
        folder=context.run.folder(
            heat_maps.STAGE,
            inputs={"model": context.fingerprint, "windows": windows.digest},
            parameters={"count": count, "relevance": relevance, **_streaming(context, stream)},
            code=["tasks.heat_maps"],
        ),
        count=count,
        relevance=relevance,
    )


def candidates_job(
    context: JobContext, profile: ProfileJob, *, specs: Sequence[LinearSpec], head: LinearSpec | None
) -> CandidatesJob:
    """Depends on the profile, on the choices, and on that of the head where it is quantized; ``specs`` are the layers
    of all blocks."""
    config = context.config.run.candidates
    choices = asked_choices(config, context.scale_bits)
    parameters: dict[str, Any] = {"choices": [str(c) for c in choices], "damping": config.damping, "grid": config.grid}
    head_choice: Choice | None = None
    if head is not None and config.quantize_head is not None:
        head_choice = fixed_choice(config.quantize_head, config.group_sizes, head.d_in)
        parameters["head"] = str(head_choice)
    if config.cost_rows is not None:
        parameters["cost_rows"] = config.cost_rows
    return CandidatesJob(
        profile=profile,
        folder=context.run.folder(
            candidates.STAGE,
            inputs={"profile": profile.folder.key, **_activations(profile.stream)},
            parameters=parameters,
            code=["tasks.candidates"],
        ),
        cut=cut_sites(specs, choices) if config.cost_rows is None else frozenset(),
        choices=choices,
        damping=config.damping,
        grid=config.grid,
        head=head_choice,
        cost_rows=config.cost_rows,
    )


def stitch_job(context: JobContext, candidates: CandidatesJob, plan: Plan) -> StitchJob:
    """Depends on the candidates, which have costs alone, and on the plan's choices."""
    return StitchJob(
        candidates=candidates,
        folder=context.run.folder(
            stitch.STAGE,
            inputs={"candidates": candidates.folder.key},
            parameters={"choices": choices_json(plan.choices)},
            code=["tasks.stitch"],
        ),
        choices=plan.choices,
    )


def asked_choices(config: CandidateConfig, scale_bits: int) -> tuple[Choice, ...]:
    """All choices of width and group size, groups with scales of so many bits."""
    return all_choices(config.bits, config.group_sizes, scale_bits=scale_bits)


def refine_job(context: JobContext, profile: ProfileJob, plan: Plan) -> RefineJob:
    """Depends on the profile's token weights, the plan's choices and the correction.

    A profile that weighs no tokens knows nothing of outputs either: rows are rounded on their own.
    """
    wanted, candidate = context.config.plan, context.config.run.candidates
    row_blocks = wanted.row_blocks if profile.weighs_tokens else 1
    parameters = {
        "strength": wanted.correction,
        "correction_damping": wanted.correction_damping,
        "polish": wanted.polish,
        "row_blocks": row_blocks,
        **_refining(context, profile.stream, plan),
    }
    return RefineJob(
        stream=profile.stream,
        folder=context.run.folder(
            refine.STAGE,
            inputs={"profile": profile.folder.key, **_activations(profile.stream)},
            parameters=parameters,
            code=["tasks.refine"],
        ),
        token_weights=profile.folder if profile.weighs_tokens else None,
        choices=plan.choices,
        strength=wanted.correction,
        damping=candidate.damping,
        correction_damping=wanted.correction_damping,
        polish_rounds=wanted.polish,
        row_blocks=row_blocks,
        grid=candidate.grid,
    )


def rebuild_job(context: JobContext, stream: StreamJob, start: Contender) -> RebuildJob:
    """Depends on the codes that it begins with, and by them on the model, the images and the grids."""
    options, seed = Reconstruction(), context.config.run.seed
    return RebuildJob(
        stream=stream,
        folder=context.run.folder(
            rebuild.STAGE,
            inputs={"codes": start.key, **_activations(stream)},
            parameters={
                "choices": choices_json(start.plan.choices),
                "options": asdict(options),
                "seed": seed,
                "dtype": context.dtype,
                "micro_batch": stream.micro_batch,
            },
            code=["tasks.rebuild"],
        ),
        codes=start.codes,
        choices=start.plan.choices,
        options=options,
        seed=seed,
    )


def control_job(context: JobContext, stream: StreamJob, plan: Plan) -> RefineJob:
    """Plain sequential GPTQ at the control's choices: all tokens alike, nothing corrected, no profile needed."""
    candidate = context.config.run.candidates
    return RefineJob(
        stream=stream,
        folder=context.run.folder(
            refine.STAGE,
            inputs={"model": context.fingerprint, "windows": stream.windows, **_activations(stream)},
            parameters=_refining(context, stream, plan),
            code=["tasks.refine"],
        ),
        token_weights=None,
        choices=plan.choices,
        strength=0.0,
        damping=candidate.damping,
        correction_damping=context.config.plan.correction_damping,  # not used at strength 0
        polish_rounds=0,
        row_blocks=1,
        grid=candidate.grid,
    )


def _activations(stream: StreamJob) -> dict[str, str]:
    return {} if stream.activations is None else {"activations": stream.activations.digest}


def _streaming(context: JobContext, stream: StreamJob) -> dict[str, Any]:
    return {"dtype": context.dtype, "num_shards": stream.num_shards, "micro_batch": stream.micro_batch}


def _refining(context: JobContext, stream: StreamJob, plan: Plan) -> dict[str, Any]:
    candidate = context.config.run.candidates
    return {
        "choices": choices_json(plan.choices),
        "damping": candidate.damping,
        "grid": candidate.grid,
        **_streaming(context, stream),
    }
