"""``lrpq compress``: the main job."""

from __future__ import annotations

from flows.boundary import resumable
from flows.commands import options as o


def compress(
    model: o.Model = None,
    *,
    budget: o.Budget = None,
    budget_bytes: o.BudgetBytes = None,
    max_kl: o.MaxKL = None,
    output: o.Output = None,
    calibration: o.Calibration = None,
    calibration_windows: o.CalibrationWindows = None,
    length: o.CalibrationLength = None,
    held_out_windows: o.HeldOut = None,
    text_column: o.TextColumn = None,
    images: o.Images = None,
    calibration_images: o.CalibrationImages = None,
    activations: o.Activations = None,
    evaluation: o.Evaluation = None,
    evaluation_windows: o.EvaluationWindows = None,
    evaluation_length: o.EvaluationLength = None,
    evaluation_images: o.EvaluationImages = None,
    top1: o.Top1 = None,
    heat_maps: o.HeatMaps = None,
    relevance: o.Relevance = None,
    gradients_every: o.GradientsEvery = None,
    rotate: o.Rotate = None,
    bits: o.Bits = None,
    group_size: o.GroupSize = None,
    scales: o.Scales = None,
    cost_rows: o.CostRows = None,
    quantize_head: o.QuantizeHead = None,
    quantize_embeddings: o.QuantizeEmbeddings = None,
    keep: o.Keep = None,
    target: o.Target = None,
    codes: o.Codes = None,
    format: o.Format = None,
    tensor_parallel: o.TensorParallel = None,
    solver: o.Solver = None,
    refine: o.Refine = None,
    share: o.Share = None,
    reconstruct: o.Reconstruct = None,
    control: o.Control = None,
    forecast: o.Forecast = None,
    evaluate: o.Evaluate = None,
    store: o.Store = None,
    run_id: o.RunId = None,
    seed: o.Seed = None,
    dtype: o.Dtype = None,
    threads: o.Threads = None,
    workers: o.Workers = None,
    device: o.Device = None,
    low_memory: o.LowMemory = None,
    address: o.Address = None,
    overwrite: o.Overwrite = None,
    fast: o.Fast = False,
    config: o.ConfigFile = None,
    as_json: o.AsJson = False,
) -> None:
    """Compress MODEL to a hard budget: a language model, or with --images an image classifier.

    --budget 3.25 bounds the bits of a weight, --budget-bytes 40GB the whole checkpoint, --max-kl 0.05 what may be
    lost. The same command again continues where an interrupted one stopped.
    """
    from flows.config_file import load_config
    from flows.run_config import default_run_id

    given = o.presets(
        {
            "run.model": model,
            "run.calibration.source": calibration,
            "run.calibration.num_windows": calibration_windows,
            "run.calibration.length": length,
            "run.calibration.held_out": held_out_windows,
            "run.calibration.text_column": text_column,
            "run.images.source": images,
            "run.images.num_images": calibration_images,
            "run.images.activations": o.whole_numbers(activations, flag="--activations"),
            "run.candidates.bits": o.whole_numbers(bits, flag="--bits"),
            "run.candidates.group_sizes": o.whole_numbers(group_size, flag="--group-size"),
            "run.candidates.scales": scales,
            "run.candidates.cost_rows": cost_rows,
            "run.candidates.quantize_head": quantize_head,
            "run.candidates.quantize_embeddings": quantize_embeddings,
            "run.relevance": relevance,
            "run.gradients_every": gradients_every,
            "run.rotate": rotate,
            "run.seed": seed,
            "run.dtype": dtype,
            "run.threads": threads,
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
            "cluster.low_memory": low_memory,
            "cluster.address": address,
            "output": output,
            "overwrite": overwrite,
            "store": store,
            "run_id": run_id,
        },
        fast=fast,
    )
    asked = load_config(config, o.nested(given))
    with resumable(asked.run_id or default_run_id(asked.run)):
        from flows.commands.reporting import reported
        from flows.preflight import preflight

        with reported(as_json=as_json) as report:
            preflight(asked)
            from flows.compress import run_compress

            report.closing(run_compress(asked, report.progress))
