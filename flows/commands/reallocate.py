"""``lrpq reallocate``: another budget from the stored candidates of a run."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.boundary import resumable
from flows.commands import options as o


def reallocate(
    run: Annotated[str, typer.Argument(help="Run id; `lrpq runs` lists them.", metavar="RUN")],
    *,
    budget: o.Budget = None,
    budget_bytes: o.BudgetBytes = None,
    max_kl: o.MaxKL = None,
    output: o.Output = None,
    keep: o.Keep = None,
    target: o.Target = None,
    codes: o.Codes = None,
    format: o.Format = None,
    tensor_parallel: o.TensorParallel = None,
    solver: o.Solver = None,
    refine: o.Refine = None,
    share: o.Share = None,
    reconstruct: o.Reconstruct = None,
    evaluation: o.Evaluation = None,
    evaluation_windows: o.EvaluationWindows = None,
    evaluation_length: o.EvaluationLength = None,
    evaluation_images: o.EvaluationImages = None,
    top1: o.Top1 = None,
    heat_maps: o.HeatMaps = None,
    control: o.Control = None,
    forecast: o.Forecast = None,
    evaluate: o.Evaluate = None,
    store: o.Store = None,
    workers: o.Workers = None,
    device: o.Device = None,
    address: o.Address = None,
    low_memory: o.LowMemory = None,
    overwrite: o.Overwrite = None,
    as_json: o.AsJson = False,
) -> None:
    """Give RUN another budget.

    --refine stitch takes seconds where candidates are stored (not after --cost-rows, which --fast implies); sequential,
    the default, is better.
    """
    from flows.config import ClusterConfig, EvaluationConfig, PlanConfig, default_store
    from flows.config_file import absolute_store, checked
    from flows.run_config import check_run_id
    from lrpq.errors import ConfigError

    check_run_id(run)
    given = o.nested(
        {
            "plan.budget_bits": budget,
            "plan.budget_bytes": budget_bytes,
            "plan.max_kl": max_kl,
            "plan.keep": keep or None,
            "plan.target": target,
            "plan.codes": codes,
            "plan.format": format,
            "plan.tensor_parallel": tensor_parallel,
            "plan.solver": solver,
            "plan.refine": refine,
            "plan.share": share,
            "plan.reconstruct": reconstruct,
            "evaluation.source": evaluation,
            "evaluation.num_windows": evaluation_windows,
            "evaluation.length": evaluation_length,
            "evaluation.num_images": evaluation_images,
            "evaluation.top1": top1,
            "evaluation.heat_maps": heat_maps,
            "evaluation.control": control,
            "evaluation.forecast": forecast,
            "evaluation.enabled": evaluate,
            "cluster.workers": workers,
            "cluster.device": device,
            "cluster.address": address,
            "cluster.low_memory": low_memory,
        }
    )
    sections = {name: given.get(name, {}) for name in ("plan", "evaluation", "cluster")}
    plan = checked(PlanConfig, sections["plan"], options=sections["plan"], section=("plan",))
    measured = checked(
        EvaluationConfig, sections["evaluation"], options=sections["evaluation"], section=("evaluation",)
    )
    cluster = checked(ClusterConfig, sections["cluster"], options=sections["cluster"], section=("cluster",))
    if output is None:
        raise ConfigError("no output: give --output DIR")
    folder = output.expanduser().absolute()
    where = absolute_store(store or default_store())
    with resumable():
        from flows.commands.reporting import reported
        from flows.preflight import check_store, check_text, preflight_output

        with reported(as_json=as_json) as report:
            preflight_output(folder, overwrite=bool(overwrite), run_id=run, plan=plan)
            if measured.enabled and measured.source is not None:
                check_text(measured.source)
            check_store(where)
            from flows.compress import run_reallocate

            report.closing(
                run_reallocate(
                    store=where,
                    run_id=run,
                    plan=plan,
                    evaluation=measured,
                    cluster=cluster,
                    output=folder,
                    overwrite=bool(overwrite),
                    progress=report.progress,
                )
            )
