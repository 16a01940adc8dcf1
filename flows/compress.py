"""Entry points of the flows: compress, reallocate, evaluate, and what is in the store."""

from __future__ import annotations

import json
import time
from contextvars import ContextVar
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import create_table_artifact

from flows.calibrate import evaluation_only_windows
from flows.compression import Compression, resolve_dtype
from flows.config import ClusterConfig, CompressConfig, EvaluationConfig, PlanConfig, RunConfig, default_store
from flows.prefect_server import prefect_api
from flows.progress import Progress
from lrpq.model.safetensors_source import ModelSource, resolve_model
from tasks import evaluate
from tasks.cluster import open_pool
from tasks.evaluate import CheckpointCodes, EvaluateJob
from tasks.store.manifest import list_runs as stored_runs
from tasks.store.manifest import read_manifest, read_run
from tasks.store.opened import open_store
from tasks.streams import StreamJob

_asked: ContextVar[tuple[CompressConfig, Progress]] = ContextVar("asked")
STAGES = ("calibrate", "profile", "candidates", "allocate", "refine", "evaluate")


def run_compress(config: CompressConfig, progress: Progress) -> dict[str, Any]:
    """Compress a model as configured; returns the manifest that also lies in the output folder.

    Raises:
        LrpqError: anything the user can act upon.
    """
    with prefect_api():
        token = _asked.set((config, progress))
        try:
            manifest: dict[str, Any] = _compress(json.loads(config.model_dump_json()))
        finally:
            _asked.reset(token)
    return manifest


@flow(name="compress", validate_parameters=False, retries=0, persist_result=False)
def _compress(configuration: dict[str, Any]) -> dict[str, Any]:
    """The flow; its parameter is what the Prefect UI shows."""
    manifest = Compression(*_asked.get()).run()
    table = [
        {k: module[k] for k in ("name", "bits", "group_size", "num_weights", "cost_nats")}
        for module in manifest["modules"]
    ]
    create_table_artifact(key="bits-per-layer", table=table, description=f"Run {manifest['run_id']}")
    return manifest


def run_reallocate(
    store: str,
    run_id: str,
    plan: PlanConfig,
    evaluation: EvaluationConfig,
    cluster: ClusterConfig,
    output: Path,
    overwrite: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Another budget from what a run has stored; stages that are missing are computed.

    Raises:
        StoreError: no such run.
    """
    run = RunConfig.model_validate(read_run(open_store(store), run_id))
    config = CompressConfig(
        run=run,
        plan=plan,
        evaluation=evaluation,
        cluster=cluster,
        output=output,
        overwrite=overwrite,
        store=store,
        run_id=run_id,
    )
    return run_compress(config, progress)


def run_evaluate(
    checkpoint: Path,
    reference: str,
    evaluation: EvaluationConfig,
    cluster: ClusterConfig,
    progress: Progress,
) -> dict[str, Any]:
    """Perplexity and KL divergence of a written checkpoint to its original."""
    store, model = default_store(), resolve_model(reference)
    dtype = resolve_dtype(RunConfig(model=reference), ModelSource(model))
    windows = evaluation_only_windows(open_store(store), evaluation, model=model)
    with open_pool(device=cluster.device, workers=cluster.workers, threads=1, address=cluster.address) as pool:
        job = EvaluateJob(
            stream=StreamJob(
                model=str(model),
                dtype=dtype,
                store=store,
                windows=windows.key,
                num_shards=windows.num_windows,
                micro_batch=1,
                num_workers=len(pool),
            ),
            variants={"checkpoint": CheckpointCodes(path=str(checkpoint.absolute()))},
        )
        started = time.monotonic()
        progress.stage(evaluate.STAGE, 1, "pass")
        scores = evaluate.merged_scores(pool.each(evaluate.score, job))
        progress.advance(evaluate.STAGE)
        progress.done(evaluate.STAGE, seconds=time.monotonic() - started, reused=False)
    return {
        "checkpoint": str(checkpoint),
        "reference": reference,
        "evaluation": {
            "source": windows.source,
            "windows": windows.num_windows,
            "length": evaluation.length,
            **{name: asdict(evaluate.summarize(rows)) for name, rows in scores.items()},
        },
    }


def list_runs(store: str) -> list[dict[str, Any]]:
    """Runs in the store with their model and finished stages."""
    opened = open_store(store)
    return [
        {"run_id": run_id, "model": str(read_run(opened, run_id).get("model")), "stages": _finished(store, run_id)}
        for run_id in stored_runs(opened)
    ]


def run_status(store: str, run_id: str) -> dict[str, Any]:
    """What a run is configured as, and what of it is done.

    Raises:
        StoreError: no such run.
    """
    opened = open_store(store)
    configuration = read_run(opened, run_id)
    stages = []
    for stage in STAGES:
        for key in opened.folders(f"{run_id}/{stage}"):
            manifest_key = f"{run_id}/{stage}/{key}/manifest.json"
            complete = opened.exists(manifest_key)
            manifest = read_manifest(opened, manifest_key) if complete else None
            stages.append(
                {
                    "stage": stage,
                    "key": key,
                    "complete": complete,
                    "objects": sum(1 for _ in opened.list(f"{run_id}/{stage}/{key}")),
                    "seconds": None if manifest is None else manifest.seconds,
                    "created": None if manifest is None else manifest.created,
                }
            )
    return {"run_id": run_id, "configuration": configuration, "stages": stages}


def _finished(store: str, run_id: str) -> list[str]:
    opened = open_store(store)
    return [
        stage
        for stage in STAGES
        if any(opened.exists(f"{run_id}/{stage}/{key}/manifest.json") for key in opened.folders(f"{run_id}/{stage}"))
    ]
