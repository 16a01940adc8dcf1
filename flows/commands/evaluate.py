"""``lrpq evaluate``: a checkpoint against its original."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.boundary import resumable
from flows.commands import options as o


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of the compressed checkpoint.", metavar="DIR")],
    *,
    reference: Annotated[str, typer.Option("--reference", help="The original: hub id or folder.", metavar="MODEL")],
    evaluation: o.Evaluation = None,
    evaluation_windows: o.EvaluationWindows = None,
    evaluation_length: o.EvaluationLength = None,
    tasks: o.Tasks = None,
    workers: o.Workers = None,
    device: o.Device = None,
    address: o.Address = None,
    as_json: o.AsJson = False,
) -> None:
    """Measure DIR against its original.

    With --evaluation: perplexity of both, and the KL divergence of the compressed model to the original in nats per
    token. With --tasks: both models' accuracy on multiple-choice questions, and their paired difference.
    """
    from flows.config import ClusterConfig, EvaluationConfig, default_store
    from flows.config_file import absolute_model, checked
    from lrpq.errors import ConfigError

    given = o.nested(
        {
            "evaluation.source": evaluation,
            "evaluation.num_windows": evaluation_windows,
            "evaluation.length": evaluation_length,
            "cluster.workers": workers,
            "cluster.device": device,
            "cluster.address": address,
        }
    )
    texts, where = given.get("evaluation", {}), given.get("cluster", {})
    measured = checked(EvaluationConfig, texts, options=texts, section=("evaluation",))
    cluster = checked(ClusterConfig, where, options=where, section=("cluster",))
    with resumable():
        from flows.commands.reporting import reported
        from flows.preflight import check_store, preflight_evaluation

        with reported(as_json=as_json) as report:
            from flows.task_accuracy import read_tasks

            preflight_evaluation(checkpoint, reference, measured, tasks=bool(tasks))
            if measured.source is None and texts:
                raise ConfigError(
                    "--evaluation-windows and --evaluation-length cut a text: give --evaluation SOURCE too"
                )
            asked = read_tasks(tasks or ())
            check_store(default_store())
            from flows.compress import run_evaluate

            report.evaluation(
                run_evaluate(
                    checkpoint=checkpoint.expanduser().absolute(),
                    reference=absolute_model(reference),
                    evaluation=measured,
                    cluster=cluster,
                    progress=report.progress,
                    tasks=asked,
                )
            )
