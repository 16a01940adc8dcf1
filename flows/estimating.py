"""``lrpq plan``: from a configuration and a cluster to an estimate, and the tables that show it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.closing import shown_bytes
from flows.compression import resolve_dtype
from flows.config import CompressConfig, cache_folder
from flows.forecasting import can_forecast
from flows.jobs import asked_choices
from flows.progress import shown_seconds
from flows.scales import stored_scale_bits
from lrpq.allocate.parts import fixed_choice
from lrpq.allocate.trellis import check_streams
from lrpq.model.layers import Choice
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.streaming import BlockStream
from lrpq.plan.machine import Machine
from lrpq.quant.grid import Grid
from lrpq.relevance.composite import Relevance
from lrpq.relevance.head import CHUNK_TOKENS, GPU_CHUNK_TOKENS
from tasks.estimate.asked import Asked, Cluster
from tasks.estimate.machines import calibrated, machine_file, read_machine, write_machine
from tasks.resources import shards_of, windows_at_once
from tasks.streams import DTYPES

SECONDS_AN_HOUR = 3600


def asked_of(config: CompressConfig, source: ModelSource, *, device: str = "cpu") -> Asked:
    """What of a configuration decides its cost on a kind of device, "cpu" or "cuda".

    Raises:
        ConfigError: a head is to be quantized that is the embedding, or trellis codes are asked for and most weights
            cannot have them.
    """
    run, plan, measured = config.run, config.plan, config.evaluation
    dtype = DTYPES[resolve_dtype(run, source)]
    config.check_parts(tied=bool(source.config.tie_word_embeddings))
    if plan.codes == "trellis":
        check_streams(BlockStream(source, dtype=dtype).specs)
    sizes = run.candidates.group_sizes
    head: Choice | None = None
    if run.candidates.quantize_head is not None:
        spec = BlockStream(source, dtype=dtype).head_spec
        head = None if spec is None else fixed_choice(run.candidates.quantize_head, sizes, spec.d_in)
    micro_batch = windows_at_once(
        run.micro_batch,
        device=device,
        length=run.calibration.length,
        hidden=source.config.get_text_config().hidden_size,
    )
    num_windows = run.calibration.num_windows
    return Asked(
        dtype=dtype,
        num_windows=num_windows,
        length=run.calibration.length,
        held_out=run.calibration.held_out,
        num_shards=shards_of(
            run.shards,
            device=device,
            num_windows=num_windows,
            length=run.calibration.length,
            micro_batch=micro_batch,
        ),
        shards_asked=run.shards is not None,
        micro_batch=micro_batch,
        threads=run.threads,
        relevance=Relevance(run.relevance),
        choices=asked_choices(run.candidates, stored_scale_bits(run, source)),
        grid=Grid(run.candidates.grid),
        budget_bits=plan.budget_bits or 0.0,
        sequential=plan.refine == "sequential",
        corrected=plan.correction > 0,
        polish_rounds=plan.polish,
        row_blocks=plan.row_blocks if run.gradients_every == 1 else 1,
        evaluated_windows=measured.num_windows if measured.enabled else 0,
        evaluated_length=measured.length,
        control=measured.control,
        forecast=can_forecast(config),
        head_choice=head,
        gradients_every=run.gradients_every,
        cost_rows=run.candidates.cost_rows,
        label_tokens=GPU_CHUNK_TOKENS if device == "cuda" else CHUNK_TOKENS,
        trellis=plan.codes == "trellis",
        low_memory=config.cluster.low_memory and device == "cuda",
    )


def this_machine(threads: int, store: str, *, again: bool, say: Callable[[str], None]) -> Machine:
    """This machine's rates: stored ones, or measured now and stored.

    Raises:
        ConfigError: nothing can be written.
    """
    path = machine_file(cache_folder(), threads)
    if path.is_file() and not again:
        return read_machine(path)
    folder = cache_folder() if "://" in store else Path(store)
    machine = calibrated(threads, folder, say=say)
    write_machine(path, machine)
    return machine


def this_cluster(machine: Machine, config: CompressConfig) -> Cluster:
    """This machine alone, with what is free on it now."""
    import os

    local = "://" not in config.store
    folder = Path(config.store) if local else cache_folder()
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return Cluster(
        machine=machine,
        nodes=1,
        gpus_per_node=0,
        cpus_per_node=len(os.sched_getaffinity(0)),
        host_bytes=int(psutil.virtual_memory().available),
        device_bytes=0,
        disk_bytes=psutil.disk_usage(str(nearest)).free,
        network_bytes_per_second=1e9,
        remote_store=not local,
        workers=config.cluster.workers,
    )


def scaled_to(machine: Machine, gpu_bytes: int | None) -> Machine:
    """The machine with another memory."""
    return machine if gpu_bytes is None else replace(machine, device_bytes=gpu_bytes)


def print_estimate(model: str, document: Mapping[str, Any], console: Console) -> None:
    """Tables of an estimate: totals, stages, what does not fit, what was assumed."""
    console.print(Text(f"plan of {model}", style="bold"))
    console.print(
        f"{document['num_parameters'] / 1e9:.2f} billion parameters, {document['num_weights'] / 1e9:.2f} billion "
        f"quantized; {shown_bytes(document['model_bytes'])} to {shown_bytes(document['checkpoint_bytes'])}; "
        f"{document['workers']} workers, {document['workers_a_node']} a node",
        highlight=False,
    )
    table = Table(title="stages", title_justify="left")
    columns = ("FLOPs", "time", "device peak", "host peak", "spilled", "store", "objects", "moved")
    table.add_column("stage")
    for name in columns:
        table.add_column(name, justify="right")
    for stage in document["stages"]:
        table.add_row(stage["stage"], *_row(stage))
    table.add_section()
    totals = {**document, "spilled_bytes": max(s["spilled_bytes"] for s in document["stages"])}
    totals["network_bytes"] = sum(s["network_bytes"] for s in document["stages"])
    table.add_row("all", *_row(totals))
    console.print(table)
    console.print(
        f"a node: {shown_bytes(document['node_bytes'])} of memory at the most, {shown_bytes(document['disk_bytes'])} "
        "of local disk",
        highlight=False,
    )
    for problem in document["problems"]:
        console.print(Text(f"does not fit: {problem}", style="red"))
    if not document["problems"]:
        console.print(Text("it fits", style="green"))
    for text in document["assumptions"]:
        console.print(Text(f"assumed: {text}", style="dim"))


def _row(stage: Mapping[str, Any]) -> list[str]:
    def size(name: str) -> str:
        return shown_bytes(stage[name]) if stage[name] else ""

    return [
        f"{stage['flops']:.2e}" if stage["flops"] else "",
        shown_seconds(stage["seconds"]) if stage["seconds"] else "",
        size("device_bytes"),
        size("host_bytes"),
        size("spilled_bytes"),
        size("store_bytes"),
        str(stage["store_objects"] or ""),
        size("network_bytes"),
    ]
