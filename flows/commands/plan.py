"""``lrpq plan``: what a compression will take, from config.json alone."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from flows.boundary import EXIT_USER
from flows.commands import options as o

DEFAULT_BUDGET = 3.25


def plan(
    model: o.Model = None,
    *,
    gpus: Annotated[int, typer.Option("--gpus", help="GPUs of the cluster; 0 plans for this machine's CPUs.")] = 0,
    gpu: Annotated[str, typer.Option("--gpu", help="Kind of GPU whose rates come with lrpq.", metavar="NAME")] = "h100",
    gpu_memory: Annotated[
        str | None, typer.Option("--gpu-memory", help="Memory of a GPU, such as 80GB; that of its kind by default.")
    ] = None,
    nodes: Annotated[int, typer.Option("--nodes", help="Nodes that the GPUs, or workers, are spread over.")] = 1,
    node_memory: Annotated[
        str | None, typer.Option("--node-memory", help="Host memory of a node, such as 2TB.")
    ] = None,
    node_disk: Annotated[str | None, typer.Option("--node-disk", help="Free local disk of a node.")] = None,
    network: Annotated[
        float, typer.Option("--network", help="Network of a node, gigabytes a second.", metavar="GB/s")
    ] = 3.0,
    machine: Annotated[
        str | None,
        typer.Option("--machine", help="File with a machine's rates, as --calibrate writes it.", metavar="FILE"),
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure this machine again (a minute), though it is known.")
    ] = False,
    budget: o.Budget = None,
    codes: o.Codes = None,
    calibration_windows: o.CalibrationWindows = None,
    length: o.CalibrationLength = None,
    held_out_windows: o.HeldOut = None,
    evaluation_windows: o.EvaluationWindows = None,
    evaluation_length: o.EvaluationLength = None,
    relevance: o.Relevance = None,
    gradients_every: o.GradientsEvery = None,
    rotate: o.Rotate = None,
    bits: o.Bits = None,
    group_size: o.GroupSize = None,
    scales: o.Scales = None,
    cost_rows: o.CostRows = None,
    quantize_head: o.QuantizeHead = None,
    refine: o.Refine = None,
    control: o.Control = None,
    forecast: o.Forecast = None,
    evaluate: o.Evaluate = None,
    store: o.Store = None,
    dtype: o.Dtype = None,
    threads: o.Threads = None,
    workers: o.Workers = None,
    low_memory: o.LowMemory = None,
    fast: o.Fast = False,
    config: o.ConfigFile = None,
    as_json: o.AsJson = False,
) -> None:
    """Say what compressing MODEL takes: memory, store, FLOPs, time, and what does not fit.

    Only config.json is read. For this machine its speed is measured once (a minute) and kept; --gpus 8 --nodes 1
    plans for GPUs instead. Exit code 2: it does not fit.
    """
    from flows.config_file import load_config, read_settings
    from flows.output import open_console, stdout_kept_free, write_document
    from flows.prefect_server import quiet_prefect
    from lrpq.allocate.budget import parse_bytes
    from lrpq.errors import ConfigError

    given = read_settings(config) if config is not None else {}
    if gpus < 0 or nodes < 1 or (gpus and gpus % nodes):
        raise ConfigError(f"--gpus {gpus} --nodes {nodes}: give as many GPUs on every node")
    settings: dict[str, Any] = {
        "run.model": model,
        "run.calibration.num_windows": calibration_windows,
        "run.calibration.length": length,
        "run.calibration.held_out": held_out_windows,
        "run.candidates.bits": o.whole_numbers(bits, flag="--bits"),
        "run.candidates.group_sizes": o.whole_numbers(group_size, flag="--group-size"),
        "run.candidates.scales": scales,
        "run.candidates.cost_rows": cost_rows,
        "run.candidates.quantize_head": quantize_head,
        "run.relevance": relevance,
        "run.gradients_every": gradients_every,
        "run.rotate": rotate,
        "run.dtype": dtype,
        "run.threads": threads,
        "plan.budget_bits": budget,
        "plan.codes": codes,
        "plan.refine": refine,
        "evaluation.num_windows": evaluation_windows,
        "evaluation.length": evaluation_length,
        "evaluation.control": control,
        "evaluation.forecast": forecast,
        "evaluation.enabled": evaluate,
        "cluster.workers": workers,
        "cluster.low_memory": low_memory,
        "store": store,
    }
    if "output" not in given:
        settings["output"] = "planned"  # nothing is written
    if "source" not in given.get("evaluation", {}):
        settings["evaluation.source"] = "pydoc:evaluate"  # nothing is read
    if budget is None and "plan" not in given:
        settings["plan.budget_bits"] = DEFAULT_BUDGET
    asked = load_config(config, o.nested(o.presets(settings, fast=fast)))
    if asked.plan.budget_bits is None:
        raise ConfigError("a plan needs a budget in bits a weight: give --budget BITS")
    quiet_prefect()
    with stdout_kept_free():
        from pathlib import Path

        from flows.estimating import asked_of, this_cluster, this_machine
        from flows.rotation import rotated
        from lrpq.model.described import DescribedModel, resolve_description
        from tasks.estimate.asked import Cluster
        from tasks.estimate.machines import known_gpu, read_machine
        from tasks.estimate.report import estimate

        source = rotated(DescribedModel(resolve_description(asked.run.model)), asked.run)
        wanted = asked_of(asked, source, device="cuda" if gpus else "cpu")

        def say(text: str) -> None:
            typer.echo(f"measuring this machine: {text}", err=True)

        if gpus:
            kind = read_machine(Path(machine)) if machine else known_gpu(gpu)
            cluster = Cluster(
                machine=kind,
                nodes=nodes,
                gpus_per_node=gpus // nodes,
                cpus_per_node=max(gpus // nodes, 1) * asked.run.threads,
                host_bytes=parse_bytes(node_memory) if node_memory else kind.host_bytes,
                device_bytes=parse_bytes(gpu_memory) if gpu_memory else kind.device_bytes,
                disk_bytes=parse_bytes(node_disk) if node_disk else 10**13,
                network_bytes_per_second=network * 1e9,
                remote_store=nodes > 1 or "://" in asked.store,
                workers=asked.cluster.workers,
            )
        else:
            kind = (
                read_machine(Path(machine))
                if machine
                else this_machine(asked.run.threads, asked.store, again=calibrate, say=say)
            )
            cluster = this_cluster(kind, asked)
        found = estimate(source, wanted, cluster).document()
    if as_json:
        write_document({"model": asked.run.model, **found})
    else:
        from flows.estimating import print_estimate

        print_estimate(asked.run.model, found, open_console())
    if found["problems"]:
        raise typer.Exit(EXIT_USER)
