"""One compression: the stages from calibration windows to an evaluated checkpoint, in order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flows.calibrate import StoredWindows, calibration_windows, evaluation_windows
from flows.config import CompressConfig, RunConfig, default_run_id
from flows.manifest_file import MANIFEST, read_manifest_file, write_manifest_file
from flows.progress import Progress
from flows.run import Run, step
from flows.stages import (
    choices_json,
    count_degradations,
    modules_json,
    run_candidates,
    run_evaluate,
    run_profile,
    run_refine,
)
from lrpq import __version__
from lrpq.allocate.plan import Plan
from lrpq.allocate.problem import CostRow
from lrpq.checkpoint.plan import planned_size
from lrpq.model.layers import Choice
from lrpq.model.safetensors_source import ModelSource, resolve_model
from lrpq.model.streaming import BlockStream
from tasks import allocate, assemble, candidates, evaluate, profile, refine
from tasks.artifacts import StageFolder
from tasks.assemble import AssembleJob
from tasks.candidates import CandidatesJob
from tasks.cluster import Pool, open_pool, resolve_device
from tasks.evaluate import CheckpointCodes, EvaluateJob, StoredCodes, Variant
from tasks.model_identity import model_fingerprint
from tasks.profile import ProfileJob
from tasks.refine import RefineJob
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


class Compression:
    """One compression; methods in the order in which they run."""

    def __init__(self, config: CompressConfig, progress: Progress) -> None:
        self.config = config
        self.model = resolve_model(config.run.model)
        self.source = ModelSource(self.model)
        self.fingerprint = model_fingerprint(self.model)
        self.dtype = resolve_dtype(config.run, self.source)
        self.stream = BlockStream(self.source, dtype=DTYPES[self.dtype])
        self.run_id = config.run_id or default_run_id(config.run)
        store = open_store(config.store)
        claim_run(store, self.run_id, json.loads(config.run.model_dump_json()))
        self.run_state = Run(
            store=store,
            run_id=self.run_id,
            progress=progress,
            device=resolve_device(config.cluster.device),
            threads=config.run.threads,
        )

    def run(self) -> dict[str, Any]:
        """All stages; the manifest."""
        cluster = self.config.cluster
        with open_pool(
            device=cluster.device, workers=cluster.workers, threads=self.config.run.threads, address=cluster.address
        ) as pool:
            prepared = self._prepare(len(pool))
            run_profile(self.run_state, pool, prepared.profile, num_blocks=self.stream.num_blocks)
            rows = run_candidates(self.run_state, pool, prepared.candidates, self.stream)
            plan, control = self._allocate(rows, prepared)
            return self._finish(pool, prepared, rows, plan, control)

    def _prepare(self, num_workers: int) -> Prepared:
        run, config = self.run_state, self.config.run
        windows = calibration_windows(run, config, model=self.model, fingerprint=self.fingerprint)
        self.measured: StoredWindows | None = None
        if self.config.evaluation.enabled:  # read now: a text that is too short must not show after the work
            self.measured = evaluation_windows(
                run, self.config, model=self.model, fingerprint=self.fingerprint, calibration=windows
            )
        num_shards = min(config.shards, windows.num_windows)
        stream_job = StreamJob(
            model=str(self.model),
            dtype=self.dtype,
            store=self.config.store,
            windows=windows.key,
            num_shards=num_shards,
            micro_batch=config.micro_batch,
            num_workers=num_workers,
        )
        folder = run.folder(
            profile.STAGE,
            inputs={"model": self.fingerprint, "windows": windows.digest},
            parameters={
                "relevance": config.relevance,
                "floor": config.relevance_floor,
                "power": config.relevance_power,
                "seed": config.seed,
                "dtype": self.dtype,
                "num_shards": num_shards,
                "micro_batch": config.micro_batch,
            },
            code=["tasks.profile"],
        )
        profile_job = ProfileJob(
            stream=stream_job,
            folder=folder,
            relevance=config.relevance,
            floor=config.relevance_floor,
            power=config.relevance_power,
            seed=config.seed,
        )
        choices = tuple(
            Choice(bits=bits, group_size=size)
            for bits in config.candidates.bits
            for size in config.candidates.group_sizes
        )
        self._pose(allocate.rows_without_costs(self.stream.specs, choices))  # what is wrong with the plan shows here
        candidates_job = CandidatesJob(
            profile=profile_job,
            folder=run.folder(
                candidates.STAGE,
                inputs={"profile": folder.key},
                parameters={
                    "choices": [str(c) for c in choices],
                    "damping": config.candidates.damping,
                    "grid": config.candidates.grid,
                },
                code=["tasks.candidates"],
            ),
            choices=choices,
            damping=config.candidates.damping,
            grid=config.candidates.grid,
        )
        return Prepared(stream=self.stream, stream_job=stream_job, profile=profile_job, candidates=candidates_job)

    def _allocate(self, rows: list[dict[str, Any]], prepared: Prepared) -> tuple[Plan, Plan | None]:
        """The plan under the budget, and the uniform control at the width nearest to what it reaches."""
        run, wanted = self.run_state, self.config.plan
        folder = run.folder(
            "allocate",
            inputs={"candidates": prepared.candidates.folder.key},
            parameters=json.loads(wanted.model_dump_json(exclude={"refine", "correction", "correction_damping"})),
            code=["tasks.allocate"],
        )
        cost_rows = allocate.cost_rows(rows, self.stream.specs)
        with run.timed("allocate", 1, "plan"):
            posed = self._pose(cost_rows)
            plan = step("allocate", lambda: allocate.solve(posed.problem, solver=wanted.solver))
            control = None
            if self.config.evaluation.enabled and self.config.evaluation.control:
                control = allocate.control(posed.unlimited, at_bits=plan.average_bits)
            run.progress.advance("allocate")
        if not run.store.exists(folder.manifest):
            run.finish(folder, "allocate", {"choices": choices_json(plan.choices), "cost_nats": plan.cost_nats})
        if not plan.binding:
            run.warn("the budget is larger than every module at its best choice needs; it is not used up")
        return plan, control

    def _pose(self, rows: list[CostRow]) -> allocate.Posed:
        wanted = self.config.plan
        return allocate.pose(
            rows,
            self.source,
            budget_bits=wanted.budget_bits,
            budget_bytes=wanted.budget_bytes,
            keep=wanted.keep,
            target=wanted.target,
            tensor_parallel=wanted.tensor_parallel,
        )

    def _finish(
        self,
        pool: Pool,
        prepared: Prepared,
        rows: list[dict[str, Any]],
        plan: Plan,
        control: Plan | None,
    ) -> dict[str, Any]:
        run, wanted = self.run_state, self.config.plan
        codes: StageFolder | CandidatesJob = prepared.candidates
        degraded = count_degradations(rows)
        if wanted.refine == "sequential":
            job = self._refine_job(prepared, plan, weighted=True, strength=wanted.correction)
            counts = run_refine(run, pool, job, self.stream, label="refine")
            degraded |= {"correction_rejected_rows": counts["rejected_rows"], "rows": counts["rows"]}
            codes = job.folder
        quantized = {name: choice for name, choice in plan.choices.items() if choice is not None}
        manifest = self._manifest(rows, plan, degraded)
        key = _content_key(codes, plan)
        manifest["content_key"] = key
        # Beside the content key: a run that is stopped after this is written finds its checkpoint complete.
        size = planned_size(self.source, quantized)
        manifest["size"] = {**asdict(size), "average_bits": size.average_bits}
        reached = self._assemble(pool, codes, quantized, manifest, key)
        manifest["budget"] |= {"reached_bits": reached["average_bits"], "reached_bytes": reached["total_bytes"]}
        manifest["bytes"] = {"original": _model_bytes(self.model), "compressed": reached["total_bytes"]}
        if self.measured is not None:
            manifest["evaluation"] = self._evaluate(pool, prepared, self.measured, control, key)
        manifest |= {"seconds": run.seconds, "reused": run.reused, "warnings": run.warnings}
        manifest["computed_nothing"] = _computed_nothing(run)
        write_manifest_file(self.config.output / MANIFEST, manifest)
        return manifest

    def _refine_job(self, prepared: Prepared, plan: Plan, *, weighted: bool, strength: float) -> RefineJob:
        run, config = self.run_state, self.config.run
        folder = run.folder(
            refine.STAGE,
            inputs={
                "model": prepared.profile.folder.key if weighted else self.fingerprint,
                "windows": prepared.stream_job.windows,
            },
            parameters={
                "choices": choices_json(plan.choices),
                "strength": strength,
                "damping": config.candidates.damping,
                "correction_damping": self.config.plan.correction_damping,
                "grid": config.candidates.grid,
                "dtype": self.dtype,
                "num_shards": prepared.stream_job.num_shards,
                "micro_batch": config.micro_batch,
            },
            code=["tasks.refine"],
        )
        return RefineJob(
            stream=prepared.stream_job,
            folder=folder,
            token_weights=prepared.profile.folder if weighted else None,
            choices=plan.choices,
            strength=strength,
            damping=config.candidates.damping,
            correction_damping=self.config.plan.correction_damping,
            grid=config.candidates.grid,
        )

    def _assemble(
        self,
        pool: Pool,
        codes: StageFolder | CandidatesJob,
        quantized: Mapping[str, Choice],
        manifest: Mapping[str, Any],
        key: str,
    ) -> Mapping[str, Any]:
        """Write the checkpoint, unless the very same one lies in the output folder already."""
        run, output = self.run_state, self.config.output
        present = read_manifest_file(output / MANIFEST)
        if present is not None and present.get("content_key") == key and _is_whole(output, present):
            run.reused.append(assemble.STAGE)
            run.seconds[assemble.STAGE] = 0.0
            run.progress.done(assemble.STAGE, seconds=0.0, reused=True)
            size: Mapping[str, Any] = present["size"]
        else:
            job = AssembleJob(
                model=str(self.model),
                store=self.config.store,
                output=str(output.absolute()),
                overwrite=self.config.overwrite,
                codes=codes,
                choices=quantized,
                specs=self.stream.specs,
                manifest=manifest,
            )
            with run.timed(assemble.STAGE, 1, "checkpoint"):
                size = step("assemble", lambda: pool.get([pool.submit(0, assemble.assemble, job)])[0])
                run.progress.advance(assemble.STAGE)
        return size

    def _evaluate(
        self, pool: Pool, prepared: Prepared, windows: StoredWindows, control: Plan | None, key: str
    ) -> dict[str, Any]:
        run, config = self.run_state, self.config.evaluation
        variants: dict[str, Variant] = {"lrpq": CheckpointCodes(path=str(self.config.output.absolute()))}
        inputs = {"windows": windows.digest, "lrpq": key, "model": self.fingerprint}
        if control is not None:
            job = self._refine_job(prepared, control, weighted=False, strength=0.0)
            run_refine(run, pool, job, self.stream, label="control")
            variants["control"] = StoredCodes(folder=job.folder, choices=control.choices)
            inputs["control"] = job.folder.key
        stream_job = replace(prepared.stream_job, windows=windows.key, num_shards=windows.num_windows, micro_batch=1)
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

    def _manifest(self, rows: list[dict[str, Any]], plan: Plan, degraded: Mapping[str, int]) -> dict[str, Any]:
        wanted = self.config.plan
        return {
            "lrpq": __version__,
            "run_id": self.run_id,
            "model": self.config.run.model,
            "configuration": json.loads(self.config.model_dump_json(exclude={"store", "output"})),
            "environment": self.run_state.environment,
            "budget": {
                "asked_bits": wanted.budget_bits,
                "asked_bytes": wanted.budget_bytes,
                "predicted_kl_nats": plan.cost_nats,
                "bound_nats": plan.bound_nats,
                "gap": plan.gap,
                "method": plan.method.value,
            },
            "modules": modules_json(self.stream.specs, plan.choices, rows),
            "kept_16bit": list(plan.names_at_16),
            "kept_because": dict(plan.left_at_16),
            "degraded": dict(degraded),
        }


def resolve_dtype(config: RunConfig, source: ModelSource) -> str:
    """The dtype asked for; by default bfloat16 for a bfloat16 model, else float32."""
    if config.dtype != "auto":
        return config.dtype
    stored = source.dtype(next(name for name in source.names() if name.endswith("weight")))
    return "bfloat16" if str(stored) == "torch.bfloat16" else "float32"


def _content_key(codes: StageFolder | CandidatesJob, plan: Plan) -> str:
    """Names the checkpoint's content: where its codes come from and which of them it takes."""
    origin = codes.key if isinstance(codes, StageFolder) else codes.folder.key
    return hashlib.sha256(json.dumps([origin, choices_json(plan.choices)], sort_keys=True).encode()).hexdigest()


def _is_whole(output: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether the weight files in the folder have the bytes the manifest says."""
    size = manifest.get("size")
    return isinstance(size, dict) and size.get("total_bytes") == _model_bytes(output)


def _computed_nothing(run: Run) -> bool:
    """Whether every stage that computes was found in the store."""
    return all(label in run.reused or label in NOT_STORED for label in run.seconds)


def _model_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
