"""The whole estimate: FLOPs, memory, store and time of every stage on a cluster, and what does not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lrpq.allocate.budget import UNQUANTIZED_BITS
from lrpq.checkpoint.plan import planned_size
from lrpq.model.layers import Choice
from lrpq.model.safetensors_source import ModelSource
from tasks.estimate.asked import Asked, Cluster
from tasks.estimate.finishing import MAPPED
from tasks.estimate.load import Load
from tasks.estimate.model import ModelShape, model_shape
from tasks.estimate.objects import EMPTY, Stored, stored
from tasks.estimate.stages import loads
from tasks.estimate.trellis_rates import with_trellis_rates
from tasks.resources import SHARDS, WorkerShape, object_store_bytes, worker_shape

SPARED = ("profile", "refine", "control")
"""Stages that take less of a GPU with --low-memory."""

ASSEMBLE = "assemble"
"""The stage that one worker does alone."""
STEP_SECONDS = 0.12
"""Prefect's task run and the calls that wait for it: about 0.1 s a task (docs/log.md)."""
CUDA_CONTEXT_BYTES = 600 * 2**20
"""Context, cuBLAS workspace and kernels of a process on a GPU."""
RUN_OBJECTS = 2
"""The run's configuration and the mark of its start."""
SERVER_BYTES = 700 * 2**20
"""Prefect's server and Ray's own processes on a node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageEstimate:
    """One stage on the cluster."""

    stage: str
    flops: float
    """Of all workers."""
    seconds: float
    device_bytes: float
    """Peak of a worker: on its GPU, or without GPUs in its process."""
    host_bytes: float
    """Peak of a worker's process."""
    parts: Mapping[str, float]
    """What the peaks are made of, bytes."""
    spilled_bytes: float
    """On the local disk of a worker."""
    store_bytes: float
    store_objects: int
    network_bytes: float
    """Between workers and between workers and the store, all together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a run will take."""

    num_parameters: int
    num_weights: int
    """That are quantized."""
    model_bytes: int
    checkpoint_bytes: float
    workers: int
    workers_a_node: int
    stages: tuple[StageEstimate, ...]
    node_bytes: float
    """Peak host memory of a node: its workers, Ray's object store, the servers."""
    disk_bytes: float
    """Peak of a node's local disk: the model, what is spilled, the checkpoint, a local store."""
    problems: tuple[str, ...]
    """What does not fit, and what to change."""
    assumptions: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def flops(self) -> float:
        """Of all stages."""
        return sum(stage.flops for stage in self.stages)

    @property
    def device_bytes(self) -> float:
        """Largest peak of a stage."""
        return max(stage.device_bytes for stage in self.stages)

    @property
    def host_bytes(self) -> float:
        """Largest peak of a worker's process."""
        return max(stage.host_bytes for stage in self.stages)

    @property
    def reload_bytes(self) -> float:
        """What the finished checkpoint's proof needs on the node of one worker."""
        return _assembling(self.stages)

    @property
    def store_bytes(self) -> float:
        """Of all stages."""
        return sum(stage.store_bytes for stage in self.stages)

    @property
    def store_objects(self) -> int:
        """Of all stages, and the run's own."""
        return sum(stage.store_objects for stage in self.stages) + RUN_OBJECTS

    def document(self) -> dict[str, Any]:
        """As JSON, totals included."""
        totals = {
            name: getattr(self, name)
            for name in (
                "seconds",
                "flops",
                "device_bytes",
                "host_bytes",
                "reload_bytes",
                "store_bytes",
                "store_objects",
            )
        }
        return {**asdict(self), **totals, "fits": not self.problems}


def estimate(source: ModelSource, asked: Asked, cluster: Cluster, *, shape: ModelShape | None = None) -> Estimate:
    """Plan a compression of a model of which config.json is known.

    Args:
        source: the model.
        asked: the job.
        cluster: where it runs.
        shape: the same model, traced before for the same job.

    Raises:
        ModelError: an architecture that lrpq does not know.
        ConfigError: a choice that does not fit its layer, or trellis codes on a machine without rates of them.
    """
    if asked.trellis:
        cluster = replace(cluster, machine=with_trellis_rates(cluster.machine))
    shape = model_shape(source, asked) if shape is None else shape
    cuda = cluster.machine.device == "cuda"
    workers = worker_shape(
        device=cluster.machine.device,
        requested=cluster.workers,
        threads=asked.threads,
        cluster_cpus=float(cluster.nodes * cluster.cpus_per_node),
        cluster_gpus=float(cluster.nodes * cluster.gpus_per_node),
        free_bytes=cluster.host_bytes,
    )
    loaded = loads(shape, asked, num_workers=workers.num_workers, cpu=not cuda, kept_bytes=workers.kept_bytes)
    in_store = stored(shape, asked)
    found = [_stage(name, load, in_store.get(name, EMPTY), cluster) for name, load in loaded.items()]
    others = [(name, of) for name, of in in_store.items() if name not in loaded]
    found = [_only_stored(name, of) for name, of in others] + found
    a_node = -(-workers.num_workers // cluster.nodes)
    beside = object_store_bytes(cluster.host_bytes) + SERVER_BYTES
    together = a_node * max(stage.host_bytes for stage in found if stage.stage != ASSEMBLE)
    alone = _assembling(found) + (a_node - 1) * float(cluster.machine.process_bytes)
    node_bytes = max(together, alone) + beside
    checkpoint = checkpoint_bytes(shape, asked)
    spilled = a_node * max(stage.spilled_bytes for stage in found)
    local = 0.0 if cluster.remote_store else sum(stage.store_bytes for stage in found)
    disk = shape.disk_bytes + checkpoint + spilled + local
    return Estimate(
        num_parameters=shape.num_parameters,
        num_weights=shape.num_weights,
        model_bytes=shape.disk_bytes,
        checkpoint_bytes=checkpoint,
        workers=workers.num_workers,
        workers_a_node=a_node,
        stages=tuple(found),
        node_bytes=node_bytes,
        disk_bytes=disk,
        problems=tuple(_problems(shape, asked, cluster, workers, found, node_bytes=node_bytes, disk_bytes=disk)),
        assumptions=tuple(_assumptions(shape, asked, cluster, workers)),
    )


def checkpoint_bytes(shape: ModelShape, asked: Asked) -> float:
    """Weight files of the result, headers included: those of a uniform choice, their codes scaled to the budget."""
    head = shape.stream.head_spec if asked.head_choice is not None else None
    specs = shape.specs if head is None else (*shape.specs, head)
    choices: dict[str, Choice] = {}
    for spec in shape.specs:
        fitting = [choice for choice in asked.choices if choice.fits(spec.d_in)]
        if fitting:
            choices[spec.name] = min(fitting, key=lambda c: abs(c.bits - asked.budget_bits))
    if head is not None and asked.head_choice is not None:
        choices[head.name] = asked.head_choice
    size = planned_size(shape.source, choices, specs=specs)
    return size.fixed_bytes + size.num_quantized_weights * min(asked.budget_bits, UNQUANTIZED_BITS) / 8


def _stage(name: str, load: Load, of: Stored, cluster: Cluster) -> StageEstimate:
    machine = cluster.machine
    cuda = machine.device == "cuda"
    rates = dict(machine.rates)
    if cluster.remote_store:
        share = cluster.network_bytes_per_second / max(cluster.gpus_per_node, 1)
        rates["store-read"], rates["store-write"] = (min(rates[k], share) for k in ("store-read", "store-write"))
        rates["matrix-read"], rates["matrix-write"] = (min(rates[k], share) for k in ("matrix-read", "matrix-write"))
    tensors, host = sum(load.tensors.values()), sum(load.host.values())
    transfer = load.network_bytes / cluster.nodes / cluster.network_bytes_per_second if cluster.nodes > 1 else 0.0
    reads = sum(load.work.amounts.get(kind, 0.0) for kind in ("store-read", "matrix-read"))
    return StageEstimate(
        stage=name,
        flops=load.work.flops,
        seconds=load.busiest.seconds(rates) + load.fixed_seconds + load.steps * STEP_SECONDS + transfer,
        device_bytes=tensors + CUDA_CONTEXT_BYTES if cuda else machine.process_bytes + tensors + host,
        host_bytes=machine.process_bytes + host + (0.0 if cuda else tensors),
        parts={**load.tensors, **load.host},
        spilled_bytes=load.spilled_bytes,
        store_bytes=of.num_bytes,
        store_objects=of.num_objects,
        network_bytes=load.network_bytes + (of.num_bytes + reads if cluster.remote_store else 0.0),
    )


def _only_stored(name: str, of: Stored) -> StageEstimate:
    """A stage of seconds, whose work is not counted: texts, the allocation."""
    return StageEstimate(
        stage=name,
        flops=0.0,
        seconds=0.0,
        device_bytes=0.0,
        host_bytes=0.0,
        parts={},
        spilled_bytes=0.0,
        store_bytes=of.num_bytes,
        store_objects=of.num_objects,
        network_bytes=0.0,
    )


def _assembling(stages: Sequence[StageEstimate]) -> float:
    """What the proof of the checkpoint needs: mapped files are resident too, but need not be."""
    found = next(stage for stage in stages if stage.stage == ASSEMBLE)
    return found.host_bytes - found.parts.get(MAPPED, 0.0)


def _problems(
    shape: ModelShape,
    asked: Asked,
    cluster: Cluster,
    workers: WorkerShape,
    stages: Sequence[StageEstimate],
    *,
    node_bytes: float,
    disk_bytes: float,
) -> list[str]:
    found = []
    unfit = sorted({spec.d_in for spec in shape.specs if not any(c.fits(spec.d_in) for c in asked.choices)})
    if unfit:
        found.append(f"no group size divides rows of {unfit[0]}: give --group-size 32, 64 or channel")
    if cluster.machine.device == "cuda":
        worst = max(stages, key=lambda stage: stage.device_bytes)
        sharing = workers.workers_a_gpu
        if sharing > 1 and worst.device_bytes <= cluster.device_bytes < sharing * worst.device_bytes:
            found.append(
                f"{worst.stage}: {gigabytes(sharing * worst.device_bytes)} on a GPU of "
                f"{gigabytes(cluster.device_bytes)}, for {sharing} workers share it: use one worker a GPU"
            )
        elif worst.device_bytes > cluster.device_bytes:
            largest = max(worst.parts, key=lambda part: worst.parts[part])
            change = {
                "one micro-batch": f"set micro_batch below {asked.micro_batch}, or shorter windows (--length)",
                "sums of Hessians": "use more workers: each then holds fewer levels of the merge tree",
                "hidden states": "use more workers, or shorter or fewer windows",
                "what is known inside the block": "use more workers, or shorter or fewer windows",
            }.get(largest, "use GPUs with more memory")
            change += "; --low-memory takes less" if worst.stage in SPARED and not asked.low_memory else ""
            found.append(
                f"{worst.stage}: {gigabytes(worst.device_bytes)} on a GPU of {gigabytes(cluster.device_bytes)}; most "
                f"of it is {largest} ({gigabytes(worst.parts[largest])}): {change}"
            )
    assembling = _assembling(stages) + object_store_bytes(cluster.host_bytes) + SERVER_BYTES
    if assembling > cluster.host_bytes:
        found.append(
            f"assemble: {gigabytes(assembling)} of host memory on one node of {gigabytes(cluster.host_bytes)}, for the "
            "finished checkpoint is loaded whole and compared before it is published: take nodes with more memory"
        )
    elif node_bytes > cluster.host_bytes:
        worst = max((s for s in stages if s.stage != ASSEMBLE), key=lambda stage: stage.host_bytes)
        found.append(
            f"{worst.stage}: {gigabytes(node_bytes)} of host memory on a node of {gigabytes(cluster.host_bytes)} "
            f"({gigabytes(worst.host_bytes)} a worker): use fewer workers a node, or nodes with more memory"
        )
    if disk_bytes > cluster.disk_bytes:
        spilled = max(stage.spilled_bytes for stage in stages) * -(-workers.num_workers // cluster.nodes)
        hint = " (kept block inputs spill there: more memory, more nodes or fewer windows)" if spilled else ""
        found.append(
            f"{gigabytes(disk_bytes)} of local disk on a node with {gigabytes(cluster.disk_bytes)}{hint}: "
            "give --store s3://..., or a larger disk"
        )
    if workers.num_workers > (asked.num_shards if asked.shards_asked else max(asked.num_shards, SHARDS)):
        found.append(
            f"{workers.num_workers} workers and {asked.num_shards} shards: some have nothing to do in profile and "
            f"refine; set shards to {workers.num_workers} or a multiple of it"
        )
    return found


def _assumptions(shape: ModelShape, asked: Asked, cluster: Cluster, workers: WorkerShape) -> list[str]:
    machine = cluster.machine
    texts = [
        f"{workers.num_workers} workers of {asked.threads} threads on {cluster.nodes} nodes of "
        f"{gigabytes(cluster.host_bytes)}; rates of {machine.name}: {machine.source}",
        f"{asked.num_windows} x {asked.length} calibration tokens in {asked.num_shards} shards, micro-batches of "
        f"{asked.micro_batch}; {str(asked.dtype).removeprefix('torch.')}",
        *(
            ["some workers have nothing to do in profile and refine: there are fewer shards"]
            if workers.num_workers > asked.num_shards
            else []
        ),
        f"every layer near {asked.budget_bits:g} bits in refinement and result: the allocation is not known before",
        "attention counts all pairs of tokens, as PyTorch's counter does; causal kernels skip up to half",
        f"Hessians compress to 84% in the store; a step of a stage costs {STEP_SECONDS} s beside its work",
        "weights are read from the local disk; a hub download is not counted",
        *machine.assumed,
    ]
    if not shape.source.as_on_disk:
        texts.append(
            "the rotation, which is folded into the weights on the host whenever they are read, is not counted"
        )
    if asked.low_memory:
        texts.append("copies between the GPU and host memory, which low memory makes, take no time")
    if workers.workers_a_gpu > 1:
        texts.append(f"{workers.workers_a_gpu} workers share a GPU; times are those of workers with a GPU each")
    if shape.routed_share < 1:
        texts.append(f"experts see {shape.routed_share:.0%} of the tokens each: routing is taken as even")
    if cluster.nodes > 1 or cluster.remote_store:
        texts.append(f"network of a node: {cluster.network_bytes_per_second / 1e9:g} GB/s")
    return texts


def gigabytes(number: float) -> str:
    """Text such as ``40.2 GB``."""
    return f"{number / 1e9:.1f} GB"
