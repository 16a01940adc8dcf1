"""Entry points of the flows: compress, reallocate and evaluate."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prefect import flow

from flows import artifacts
from flows.boundary import refuse_secrets, user_error
from flows.calibrate import evaluation_only_windows
from flows.changes import stored_change
from flows.compression import Compression, configured_pool, resolve_dtype
from flows.config import ClusterConfig, CompressConfig, EvaluationConfig, PlanConfig, default_store
from flows.image_compression import ImageCompression
from flows.manifest_file import MANIFEST, read_manifest_file
from flows.prefect_server import starting_api
from flows.progress import Progress
from flows.run_config import RunConfig, default_run_id, stored_run
from flows.states import close_abandoned, tagged
from flows.task_accuracy import Task, answer_tasks, encoded_tasks, harness_tasks
from lrpq.errors import ConfigError
from lrpq.model.families import classifies_images
from lrpq.model.safetensors_source import resolve_model
from lrpq.model.source import open_source
from tasks import evaluate
from tasks.cluster import Pool
from tasks.evaluate import CheckpointCodes, EvaluateJob
from tasks.opening import open_pool
from tasks.question_scores import QuestionsJob
from tasks.store.manifest import read_run
from tasks.store.opened import open_store
from tasks.streams import StreamJob


@dataclass(slots=True, kw_only=True)
class _Asked:
    """What a flow is to do, which is no parameter that Prefect could show, and what it has found."""

    config: CompressConfig
    progress: Progress
    pool: Pool
    manifest: dict[str, Any] | None = None


_asked: ContextVar[_Asked] = ContextVar("asked")


def run_compress(config: CompressConfig, progress: Progress, *, pool: Pool | None = None) -> dict[str, Any]:
    """Compress a model as configured; returns the manifest that also lies in the output folder.

    Args:
        config: what is asked for.
        progress: where it is reported.
        pool: workers that are open already; by default the configuration's are opened for this run.

    Raises:
        LrpqError: anything the user can act upon.
    """
    refuse_secrets(config.run.calibration.source, config.run.images.source, config.evaluation.source)
    with (
        starting_api() as api,
        nullcontext(pool) if pool is not None else configured_pool(config) as workers,  # Ray starts beside the server
    ):
        api()
        asked = _Asked(config=config, progress=progress, pool=workers)
        token = _asked.set(asked)
        run_id = config.run_id or default_run_id(config.run)
        close_abandoned(run_id)
        try:
            with tagged(run_id):
                _compress.with_options(flow_run_name=run_name(config, run_id))(json.loads(config.model_dump_json()))
        except Exception as error:
            if asked.manifest is None or user_error(error) is not None:
                raise
            # the checkpoint is there: what failed is to tell Prefect
            progress.note(f"Prefect shows the run as unfinished, its server does not answer ({type(error).__name__})")
        finally:
            _asked.reset(token)
    if asked.manifest is None:
        raise RuntimeError("the flow ended without a result")
    return asked.manifest


def run_name(config: CompressConfig, run_id: str) -> str:
    """What a flow run is called, such as ``smollm2-0f3a9c11 · 3.25 bits``."""
    plan = config.plan
    codes = "" if plan.codes == "uniform" else f" · {plan.codes} codes"
    if plan.budget_bits is not None:
        return f"{run_id} · {plan.budget_bits:g} bits{codes}"
    if plan.budget_bytes is not None:
        return f"{run_id} · {plan.budget_bytes:,} bytes{codes}"
    return f"{run_id} · KL {plan.max_kl:g}{codes}"


@flow(name="compress", validate_parameters=False, retries=0, persist_result=False)
def _compress(configuration: dict[str, Any]) -> dict[str, Any]:
    """The flow; its parameter is what the Prefect UI shows."""
    asked = _asked.get()
    asked.manifest = manifest = compress_in_flow(asked.config, asked.progress, pool=asked.pool)
    return manifest


def compress_in_flow(config: CompressConfig, progress: Progress, *, pool: Pool | None = None) -> dict[str, Any]:
    """The stages and their artifacts; call it inside a flow run.

    Raises:
        LrpqError: anything the user can act upon.
    """
    with artifacts.shown(progress) as shown:
        kind = Compression if config.run.images.source is None else ImageCompression
        manifest = kind(config, shown).run(pool)
    artifacts.publish(manifest)
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
    run = stored_run(read_run(open_store(store), run_id))
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
    *,
    tasks: Mapping[str, Task] | None = None,
) -> dict[str, Any]:
    """A written checkpoint against its original: perplexity and KL divergence on a text, accuracy on questions.

    Args:
        checkpoint: its folder.
        reference: the original.
        evaluation: the text; nothing is measured on one if no source is named.
        cluster: where it is computed.
        progress: where it is reported.
        tasks: by name, as from ``read_tasks``.

    Raises:
        LrpqError: anything the user can act upon.
    """
    store, model = default_store(), resolve_model(reference)
    source = open_source(model)
    if classifies_images(source.config):
        raise ConfigError(
            f"model {reference!r} classifies images: lrpq evaluate takes language models; the scores of a classifier "
            f"are in its {MANIFEST}"
        )
    dtype = resolve_dtype(RunConfig(model=reference), source)
    change = stored_change(read_manifest_file(checkpoint / MANIFEST))
    evaluate.check_changed(checkpoint, model, change)
    asked = tasks or {}
    questions = encoded_tasks(asked, model)
    measured = evaluation.source is not None
    windows = evaluation_only_windows(open_store(store), evaluation, model=model) if measured else None
    result: dict[str, Any] = {"checkpoint": str(checkpoint), "reference": reference}
    found: dict[str, dict[str, Any]] = {}
    if windows is not None or questions:
        with open_pool(device=cluster.device, workers=cluster.workers, threads=1, address=cluster.address) as pool:
            if windows is not None:
                stream = StreamJob(
                    model=str(model),
                    dtype=dtype,
                    store=store,
                    windows=windows.key,
                    length=evaluation.length,
                    num_tokens=windows.num_windows * evaluation.length,
                    num_shards=windows.num_windows,
                    micro_batch=1,
                    change=change,
                )
                summaries = _divergence(pool, stream, checkpoint, progress)
                text = {"source": windows.source, "windows": windows.num_windows, "length": evaluation.length}
                result["evaluation"] = {**text, **summaries}
            if questions:
                models = QuestionsJob(
                    model=str(model), dtype=dtype, checkpoint=str(checkpoint.absolute()), change=change
                )
                found |= answer_tasks(pool, models, asked, questions, progress)
    if asked:
        found |= harness_tasks(asked, model=model, checkpoint=checkpoint, device=cluster.device, progress=progress)
        result["tasks"] = found
    return result


def _divergence(pool: Pool, stream: StreamJob, checkpoint: Path, progress: Progress) -> dict[str, dict[str, Any]]:
    """Summaries of the original and the checkpoint on the stream's windows."""
    job = EvaluateJob(stream=stream, variants={"checkpoint": CheckpointCodes(path=str(checkpoint.absolute()))})
    started = time.monotonic()
    progress.stage(evaluate.STAGE, 1, "pass")
    scores = evaluate.merged_scores(pool.each(evaluate.score, job))
    progress.advance(evaluate.STAGE)
    progress.done(evaluate.STAGE, seconds=time.monotonic() - started, reused=False)
    return {name: asdict(evaluate.summarize(rows)) for name, rows in scores.items()}
