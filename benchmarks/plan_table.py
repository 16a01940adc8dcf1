"""The table of docs/plan.md: what ``lrpq plan`` says of some models from their config.json alone.

    python -m benchmarks.plan_table [--gpus 8] [--node-memory 2TB]

The configurations are in docs/configs; the clusters are nodes of 8 H100, as many as --gpus asks for.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from flows.config import CompressConfig
from flows.estimating import asked_of
from lrpq.allocate.budget import parse_bytes
from lrpq.model.described import DescribedModel
from tasks.estimate.asked import Cluster
from tasks.estimate.machines import known_gpu
from tasks.estimate.report import Estimate, estimate

CONFIGS = Path(__file__).parents[1] / "docs" / "configs"
TRELLIS = "llama-3-8b"
"""The model whose plan with trellis codes has a row."""
MODELS = ("llama-3-8b", "gemma-3-27b", "llama-3-70b", "qwen2.5-72b", "mixtral-8x22b", "llama-3.1-405b")
GPUS_A_NODE = 8
THREADS = 8
COLUMNS = (
    "model",
    "parameters",
    "checkpoint",
    "FLOPs",
    "device peak",
    "host memory, node",
    "of it the reload",
    "local disk",
    "store",
    "objects",
    "moved",
    "time",
)


def planned(
    model: str,
    *,
    gpus: int = 8,
    node_memory: str = "2TB",
    budget: float = 3.25,
    low_memory: bool = False,
    workers: int | None = None,
    codes: str = "uniform",
) -> Estimate:
    source = DescribedModel(CONFIGS / model)
    config = CompressConfig.model_validate(
        {
            "run": {"model": model, "threads": THREADS, "shards": max(8, gpus)},
            "plan": {"budget_bits": budget, "codes": codes},
            "output": Path("planned"),
            "store": "s3://planned/store",
            "cluster": {"low_memory": low_memory},
        }
    )
    kind = known_gpu("h100")
    nodes = max(1, gpus // GPUS_A_NODE)
    cluster = Cluster(
        machine=kind,
        nodes=nodes,
        gpus_per_node=gpus // nodes,
        cpus_per_node=THREADS * (gpus // nodes),
        host_bytes=parse_bytes(node_memory),
        device_bytes=kind.device_bytes,
        disk_bytes=10**13,
        network_bytes_per_second=3e9,
        remote_store=True,
        workers=workers,
    )
    return estimate(source, asked_of(config, source, device="cuda"), cluster)


def row(model: str, found: Estimate) -> list[str]:
    moved = sum(stage.network_bytes for stage in found.stages)
    cells: list[Any] = [
        model,
        f"{found.num_parameters / 1e9:.1f} B",
        f"{found.checkpoint_bytes / 1e9:.1f} GB",
        f"{found.flops:.1e}",
        f"{found.device_bytes / 1e9:.0f} GB",
        f"{found.node_bytes / 1e9:.0f} GB",
        f"{found.reload_bytes / 1e9:.0f} GB",
        f"{found.disk_bytes / 1e9:.0f} GB",
        f"{found.store_bytes / 1e9:.0f} GB",
        found.store_objects,
        f"{moved / 1e12:.1f} TB",
        f"{found.seconds / 3600:.1f} h",
    ]
    return [str(cell) for cell in cells]


def trellis_row(*, gpus: int = 8, node_memory: str = "2TB") -> list[str]:
    found = planned(TRELLIS, gpus=gpus, node_memory=node_memory, codes="trellis")
    return row(f"{TRELLIS}, `--codes trellis`", found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--node-memory", default="2TB")
    arguments = parser.parse_args()
    print("| " + " | ".join(COLUMNS) + " |")
    print("|---" * len(COLUMNS) + "|")
    for model in MODELS:
        found = planned(model, gpus=arguments.gpus, node_memory=arguments.node_memory)
        print("| " + " | ".join(row(model, found)) + " |")
        for problem in found.problems:
            print(f"<!-- {model}: {problem} -->")
        if model == TRELLIS:
            coded = trellis_row(gpus=arguments.gpus, node_memory=arguments.node_memory)
            print("| " + " | ".join(coded) + " |")


if __name__ == "__main__":
    main()
