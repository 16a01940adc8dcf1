"""One compression: the stages from calibration windows to an evaluated checkpoint, in order."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch

from flows import artifacts, guard, jobs
from flows.calibrate import StoredWindows, calibration_windows, evaluation_windows
from flows.changes import change_json, change_of, changed_fingerprint
from flows.config import CompressConfig
from flows.forecasting import can_forecast, forecast, forecast_windows
from flows.guard import UNIFORM, Contender, Windows, guarded
from flows.jobs import JobContext
from flows.manifest_file import MANIFEST, write_manifest_file
from flows.output_checkpoint import Call, OutputCheckpoint
from flows.planning import Planner, Plans
from flows.progress import Progress
from flows.result import content_key, manifest_of, model_bytes
from flows.run import Run
from flows.run_config import RunConfig, default_run_id, read_configuration
from flows.scales import stored_scale_bits
from flows.scoring import ScoredWindows, score_stored, scoring_stream
from flows.search import Search
from flows.stages import count_degradations, run_candidates, run_evaluate, run_profile, run_refine
from flows.stitching import Stitching
from lrpq.allocate.parts import fixed_choice
from lrpq.allocate.plan import Plan
from lrpq.allocate.problem import CostRow
from lrpq.allocate.trellis import check_streams, without_streams
from lrpq.checkpoint.formats import CheckpointFormat
from lrpq.checkpoint.plan import planned_size
from lrpq.checkpoint.publish import check_output
from lrpq.errors import ConfigError
from lrpq.model.layers import Choice
from lrpq.model.safetensors_source import ModelSource, resolve_model
from lrpq.model.source import open_source
from lrpq.model.streaming import BlockStream
from lrpq.relevance.composite import Relevance
from lrpq.relevance.passes import has_rule_table
from lrpq.relevance.rules import Pass
from lrpq.transform.changed import changed
from tasks import allocate, assemble, evaluate, stitch
from tasks.artifacts import StageFolder
from tasks.assemble import AssembleJob
from tasks.candidates import CandidatesJob
from tasks.cluster import Pool
from tasks.evaluate import CheckpointCodes, EvaluateJob, StoredCodes, Variant
from tasks.model_identity import model_fingerprint
from tasks.opening import open_pool, resolve_device
from tasks.profile_job import ProfileJob
from tasks.refine import RefineJob
from tasks.resources import windows_at_once
from tasks.store.garbage import mark_start
from tasks.store.manifest import claim_run
from tasks.store.opened import open_store
from tasks.streams import DTYPES, StreamJob

NOT_STORED = frozenset({"allocate", assemble.STAGE})
"""Stages done again in every run: seconds of arithmetic on stored costs, and copying stored codes to the output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What all stages need: the jobs up to the candidates."""

    stream: BlockStream
    stream_job: StreamJob
    profile: ProfileJob
    candidates: CandidatesJob


def configured_pool(config: CompressConfig) -> AbstractContextManager[Pool]:
    """The workers of a configuration, for the length of the context."""
    cluster = config.cluster
    return open_pool(
        device=cluster.device,
        workers=cluster.workers,
        threads=config.run.threads,
        address=cluster.address,
        patience=cluster.patience,
        kept_bytes=cluster.kept_bytes,
        spill_folder=None if cluster.spill_folder is None else str(cluster.spill_folder),
        low_memory=cluster.low_memory,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebuilding:
    """Codes that are learnt behind the rounding."""

    contender: Contender
    """Where they will be."""
    make: Callable[[], tuple[Contender, Mapping[str, Any]]]
    """Makes them; the better of these and those they began from, and what the manifest says of it."""


class Compression:
    """One compression; methods in the order in which they run."""

    WRITER: ClassVar[str] = "tasks.assemble"
    """Module that writes the checkpoint."""
    WINDOWS: ClassVar[Windows] = Windows.TEXT
    """What the model reads."""

    def __init__(self, config: CompressConfig, progress: Progress) -> None:
        self.config = config
        self.model = resolve_model(config.run.model)
        original = open_source(self.model)
        self.scale_bits = stored_scale_bits(config.run, original)
        self.change = change_of(config.run, original, scaled=self.scale_bits == 8)
        self.source = changed(original, self.change)
        self.fingerprint = model_fingerprint(self.model)
        self.dtype = self.resolved_dtype()
        self.stream = BlockStream(self.source, dtype=DTYPES[self.dtype])
        config.check_parts(tied=self.stream.tied_head)
        config.check_scales(scale_bits=self.scale_bits, experts=any(spec.routed for spec in self.stream.specs))
        self.head = self.stream.head_spec if config.run.candidates.quantize_head is not None else None
        self.specs = self.stream.specs if self.head is None else (*self.stream.specs, self.head)
        self.planner = Planner(config, self.source, self.specs)
        self.run_id = config.run_id or default_run_id(config.run)
        store = open_store(config.store)
        claim_run(store, self.run_id, json.loads(config.run.model_dump_json()), as_read=read_configuration)
        mark_start(store, self.run_id)
        device = resolve_device(config.cluster.device)
        self.run_state = Run(
            store=store,
            run_id=self.run_id,
            progress=progress,
            device=device,
            threads=config.run.threads,
        )
        self.searched: dict[str, Any] | None = None
        """With --max-kl: what was searched and found."""
        self.context = JobContext(
            run=self.run_state,
            config=config,
            model=self.model,
            fingerprint=changed_fingerprint(self.fingerprint, self.change),
            change=self.change,
            dtype=self.dtype,
            micro_batch=windows_at_once(
                config.run.micro_batch,
                device=device,
                length=self.window_length(),
                hidden=self.source.config.get_text_config().hidden_size,
            ),
            length=self.window_length(),
            scale_bits=self.scale_bits,
        )

    def resolved_dtype(self) -> str:
        """Of weights and activations."""
        return resolve_dtype(self.config.run, self.source)

    def window_length(self) -> int:
        """Tokens of a calibration window."""
        return self.config.run.calibration.length

    def run(self, pool: Pool | None = None) -> dict[str, Any]:
        """All stages, on the given workers or on the configuration's; the manifest."""
        with nullcontext(pool) if pool is not None else configured_pool(self.config) as pool:
            self._say_how_relevance_is_found()
            prepared = self._prepare(pool)
            self._profile(pool, prepared.profile)
            rows = run_candidates(self.run_state, pool, prepared.candidates, self.stream)
            artifacts.publish_costs(rows)
            self._search(pool, prepared, rows)
            plans = self.planner.plans(self.run_state, rows, candidates_key=prepared.candidates.folder.key)
            return self._finish(pool, prepared, rows, plans)

    def _say_how_relevance_is_found(self) -> None:
        """Warn where rules are applied operation by operation, for want of a table row."""
        if Relevance(self.config.run.relevance).passes == (Pass.FISHER,):
            return
        unknown = sorted({type(block).__name__ for block in self.stream.blocks if not has_rule_table(block)})
        if unknown:
            self.run_state.warn(
                f"no table of relevance rules for {', '.join(unknown)}: rules are applied operation by operation"
            )

    def _prepare(self, pool: Pool) -> Prepared:
        run, config = self.run_state, self.config.run
        windows = calibration_windows(run, config, model=self.model, fingerprint=self.fingerprint)
        self.windows = windows
        if self.config.plan.max_kl is not None and windows.held_out is None:  # now, not after the work
            raise ConfigError("--max-kl is measured on held-out calibration windows and there are none: hold some out")
        self.measured: StoredWindows | None = None
        if self.config.evaluation.enabled:  # read now: a text that is too short must not show after the work
            self.measured = evaluation_windows(
                run, self.config, model=self.model, fingerprint=self.fingerprint, calibration=windows
            )
        self.check_plan()
        return self._jobs(windows)

    def _profile(self, pool: Pool, job: ProfileJob) -> None:
        run_profile(self.run_state, pool, job, self.stream)

    def check_plan(self) -> None:
        """Pose the plan without costs: what is wrong with it shows here, not after the work.

        Raises:
            ConfigError: see ``tasks.allocate.pose``; or trellis codes are asked for, and most weights cannot have them.
            BudgetError: the budget is impossible.
        """
        asked = self.config.run.candidates
        if self.config.plan.codes == "trellis":
            check_streams(self.stream.specs)
        rows = allocate.rows_without_costs(self.stream.specs, jobs.asked_choices(asked, self.scale_bits))
        if self.head is not None and asked.quantize_head is not None:
            choice = fixed_choice(asked.quantize_head, asked.group_sizes, self.head.d_in)
            rows += allocate.rows_without_costs([self.head], [choice])
        self._pose(rows)

    def _pose(self, rows: list[CostRow]) -> None:
        self.planner.pose(self.planner.offered(rows))
        if self.config.plan.codes == "trellis":  # of candidates the guard's and the control's plans are made
            self.planner.pose(rows)

    def _jobs(self, windows: StoredWindows) -> Prepared:
        stream_job = jobs.stream_job(self.context, windows)
        profile_job = jobs.profile_job(self.context, stream_job, windows, specs=self.stream.specs)
        candidates_job = jobs.candidates_job(self.context, profile_job, specs=self.stream.specs, head=self.head)
        return Prepared(stream=self.stream, stream_job=stream_job, profile=profile_job, candidates=candidates_job)

    def _search(self, pool: Pool, prepared: Prepared, rows: list[dict[str, Any]]) -> None:
        """With --max-kl: find the budget that keeps it.

        Raises:
            BudgetError: no budget keeps it.
        """
        max_kl = self.config.plan.max_kl
        if max_kl is None or self.windows.held_out is None:
            return
        search = Search(
            context=self.context,
            pool=pool,
            stream=self.stream,
            planner=self.planner,
            candidates=prepared.candidates,
            stitching=self._stitching(pool, prepared),
            head=None if self.head is None else prepared.candidates,
            held_out=self.windows.held_out,
        )
        self.searched = search.run(rows, max_kl=max_kl)

    def _finish(
        self,
        pool: Pool,
        prepared: Prepared,
        rows: list[dict[str, Any]],
        plans: Plans,
    ) -> dict[str, Any]:
        run, wanted = self.run_state, self.planner.wanted
        refined: RefineJob | None = None
        if wanted.refine == "sequential":
            refined = jobs.refine_job(self.context, prepared.profile, plans.ours)
        stitching = self._stitching(pool, prepared)
        ours = stitching.named(plans.ours) if refined is None else Contender(codes=refined.folder, plan=plans.ours)
        uniform = self._uniform(stitching, plans)
        head = None if self.head is None else prepared.candidates
        rebuilding = self._rebuilding(pool, prepared, ours)
        rebuilt = None if rebuilding is None else rebuilding.contender
        keys = [self._content_key(c, head=head) for c in (ours, rebuilt, uniform) if c is not None]
        # what is wrong with the output shows here, not later
        if not any(self._output(key).manifest() for key in keys):
            check_output(self.config.output, overwrite=self.config.overwrite)
        degraded = count_degradations(rows)
        expected: dict[str, Any] | None = None
        if refined is not None:
            expected = self._forecast(pool, prepared, stitching.named(plans.ours))
            counts = run_refine(run, pool, refined, self.stream, label="refine")
            degraded |= {
                "refine_damping_steps": counts["damping_steps"],
                "correction_rejected_rows": counts["rejected_rows"],
                "rows": counts["rows"],
                "modules_with_rows_alone": counts["rows_alone"],
                # the router runs on the quantized prefix: these are of the codes in the checkpoint
                "experts_pooled": counts["experts_pooled"],
                "experts_without_tokens": counts["experts_without_tokens"],
            }
        else:
            stitching.made(plans.ours, label=stitch.STAGE)
        reconstruction: Mapping[str, Any] | None = None
        if rebuilding is not None:
            ours, reconstruction = rebuilding.make()
            degraded["reconstruction_diverged"] = reconstruction["diverged"]
        compared, kept = self._guarded(pool, prepared, ours, uniform, head=head)
        rows = self._rows_of(kept, rows)
        if kept is uniform:  # what the refinement met is not of the codes that are written
            degraded = count_degradations(rows)
        degraded["kept_uniform"] = int(kept is uniform)
        if wanted.codes == "trellis" and kept is not uniform:
            degraded["modules_without_streams"] = without_streams(kept.plan.choices, self.specs)
        plan, codes, key = kept.plan, kept.codes, self._content_key(kept, head=head)
        quantized = {name: choice for name, choice in plan.choices.items() if choice is not None}
        manifest = manifest_of(
            self.config,
            plan,
            run_id=self.run_id,
            environment=run.environment,
            specs=self.specs,
            rows=rows,
            degraded=degraded,
        )
        manifest |= self.description(kept)
        manifest["guard"] = compared
        if expected is not None:
            manifest["forecast"] = {**expected, "written": kept is not uniform}
        if reconstruction is not None:
            manifest["reconstruction"] = {**reconstruction, "written": kept is rebuilt}
        manifest["budget"] |= {"search": self.searched, **self._shared_budget(kept)}
        manifest["content_key"] = key
        # Beside the content key: a run that is stopped after this is written finds its checkpoint complete.
        manifest["size"] = self._planned_size(codes, quantized)
        call = self._assembly(codes, quantized, manifest, head=head)
        reached = self._output(key).write(run, pool, call, size=manifest["size"])
        manifest["verified"] = reached["verified"]
        self._report()
        manifest["budget"] |= {"reached_bits": reached["average_bits"], "reached_bytes": reached["total_bytes"]}
        manifest["bytes"] = {"original": model_bytes(self.model), "compressed": reached["total_bytes"]}
        evaluation = self._evaluation(pool, prepared, plans.control, key)
        if evaluation is not None:
            manifest["evaluation"] = evaluation
        manifest |= {"seconds": run.seconds, "reused": run.reused, "warnings": run.warnings}
        manifest["computed_nothing"] = _computed_nothing(run)
        write_manifest_file(self.config.output / MANIFEST, manifest)
        return manifest

    def _uniform(self, stitching: Stitching, plans: Plans) -> Contender | None:
        """What the result must not be worse than; None where there is no uniform plan under the budget."""
        return None if plans.uniform is None else stitching.named(plans.uniform)

    def _stitching(self, pool: Pool, prepared: Prepared) -> Stitching:
        return Stitching(context=self.context, pool=pool, stream=self.stream, candidates=prepared.candidates)

    def _guarded(
        self,
        pool: Pool,
        prepared: Prepared,
        ours: Contender,
        uniform: Contender | None,
        *,
        head: CandidatesJob | None,
    ) -> tuple[dict[str, Any], Contender]:
        """See ``guarded``."""

        def measure(contenders: Mapping[str, Contender]) -> Mapping[str, dict[str, Any]]:
            self._stitching(pool, prepared).made(contenders[UNIFORM].plan, label=UNIFORM)
            return self._on_held_out(pool, prepared, contenders, head=head)

        wanted = self.config.run.calibration.held_out != 0
        return guarded(
            self.run_state, self.windows.held_out, ours, uniform, measure=measure, wanted=wanted, of=self.WINDOWS
        )

    def _on_held_out(
        self, pool: Pool, prepared: Prepared, contenders: Mapping[str, Contender], *, head: CandidatesJob | None
    ) -> Mapping[str, dict[str, Any]]:
        """Scores on the held-out windows, which there are."""
        held_out = self.windows.held_out
        assert held_out is not None
        windows, stream = ScoredWindows(stored=held_out, length=self.context.length), prepared.stream_job
        label = guard.STAGE
        return score_stored(self.run_state, pool, stream, windows, contenders, head=head, stage=label, label=label)

    def _forecast(self, pool: Pool, prepared: Prepared, candidates: Contender) -> dict[str, Any] | None:
        """What is to be expected of the codes that are refined next; a search has refined and measured them already."""
        if self.searched is not None or not can_forecast(self.config):
            return None
        length = self.config.evaluation.length
        found = forecast_windows(self.measured, self.windows, measured_length=length, length=self.context.length)
        if found is None:
            return None
        windows, text = found
        return forecast(self.run_state, pool, prepared.stream_job, windows, candidates, text=text)

    def _rebuilding(self, pool: Pool, prepared: Prepared, start: Contender) -> Rebuilding | None:
        """What reconstruction makes of these codes; None where nothing is rebuilt."""
        return None

    def _planned_size(self, codes: StageFolder | CandidatesJob, quantized: Mapping[str, Choice]) -> dict[str, Any]:
        """Size of the checkpoint."""
        written_as = CheckpointFormat(self.planner.wanted.format)
        size = planned_size(self.source, quantized, specs=self.specs, format=written_as)
        return {**asdict(size), "average_bits": size.average_bits}

    def _content_key(self, contender: Contender, *, head: CandidatesJob | None) -> str:
        return content_key(
            contender.codes,
            contender.plan,
            head=head,
            fingerprint=self.context.fingerprint,
            format=self.config.plan.format,
            writer=self.WRITER,
        )

    def _output(self, key: str) -> OutputCheckpoint:
        """The checkpoint with this content."""
        return OutputCheckpoint(folder=self.config.output, key=key, count_bytes=self.output_bytes)

    def _assembly(
        self,
        codes: StageFolder | CandidatesJob,
        quantized: Mapping[str, Choice],
        manifest: Mapping[str, Any],
        *,
        head: CandidatesJob | None,
    ) -> Call:
        """What writes the checkpoint."""
        job = AssembleJob(
            model=str(self.model),
            store=self.config.store,
            output=str(self.config.output.absolute()),
            overwrite=self.config.overwrite,
            codes=codes,
            head=head,
            choices=quantized,
            specs=self.specs,
            manifest=manifest,
            format=self.config.plan.format,
            target=self.config.plan.target,
            change=self.change,
        )
        return assemble.assemble, job

    def output_bytes(self) -> int:
        """Bytes of what lies in the output folder, as sizes of checkpoints are counted."""
        return model_bytes(self.config.output)

    def description(self, kept: Contender) -> dict[str, Any]:
        """What the manifest says of the model besides its weights, of which ``kept`` are written."""
        return {**change_json(self.change, self.source), "scale_bits": self.scale_bits}

    def _shared_budget(self, kept: Contender) -> dict[str, Any]:
        """What the manifest says of a budget that others share with the weights."""
        return {}

    def _rows_of(self, kept: Contender, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Cost rows of the model that codes are of, where there is another one beside that of ``rows``."""
        return rows

    def _report(self) -> None:
        """What is left in the output folder besides the checkpoint and its manifest: nothing."""

    def _evaluation(self, pool: Pool, prepared: Prepared, control: Plan | None, key: str) -> dict[str, Any] | None:
        """Scores of the original, the result and the control; None where nothing is measured."""
        run, config, windows = self.run_state, self.config.evaluation, self.measured
        if windows is None:
            return None
        variants: dict[str, Variant] = {"lrpq": CheckpointCodes(path=str(self.config.output.absolute()))}
        inputs = {"windows": windows.digest, "lrpq": key, "model": self.context.fingerprint}
        if control is not None:
            job = jobs.control_job(self.context, prepared.stream_job, control)
            run_refine(run, pool, job, self.stream, label="control")
            head = None if self.head is None else prepared.candidates
            variants["control"] = StoredCodes(folder=job.folder, choices=control.choices, head=head)
            inputs["control"] = job.folder.key if head is None else f"{job.folder.key} {head.folder.key}"
        stream_job = scoring_stream(prepared.stream_job, windows, length=config.length)
        folder = run.folder(evaluate.STAGE, inputs=inputs, parameters={"dtype": self.dtype}, code=["tasks.evaluate"])
        found = run_evaluate(run, pool, EvaluateJob(stream=stream_job, variants=variants), folder)
        result: dict[str, Any] = {
            "source": windows.source,
            "windows": windows.num_windows,
            "length": config.length,
            **found["summary"],
        }
        if control is not None:
            uniform = next(choice for choice in control.choices.values() if choice is not None)
            result["control"] |= {"label": f"uniform GPTQ {uniform}", "all_in_bits": control.average_bits}
        return result


def resolve_dtype(config: RunConfig, source: ModelSource) -> str:
    """The dtype asked for; by default bfloat16 where most weights are stored so, else float32."""
    if config.dtype != "auto":
        return config.dtype
    return "bfloat16" if source.main_dtype() is torch.bfloat16 else "float32"


def _computed_nothing(run: Run) -> bool:
    """Whether every stage that computes was found in the store."""
    return all(label in run.reused or label in NOT_STORED for label in run.seconds)
