"""``lrpq plan`` against what it plans: FLOPs, memory, store and time of real runs, predicted / measured.

    python -m benchmarks.plan MODEL [--windows 16] [--length 512] [--synthetic] [--no-control] [--json FILE]

MODEL is a folder; ``--synthetic`` writes a random 8-block Llama of hidden size 2048 with a tokenizer and plans that.
The plan is made from a copy of config.json alone, with the calibration of this machine (made if there is none). Then
the job runs twice: as a user's would, with Prefect, Ray and one worker, for seconds and bytes (the worker's resident
memory is sampled twenty times a second; the store and the checkpoint are counted), and once in one process under
PyTorch's counter of floating-point operations, which sees every matrix product of the real code (in-place products,
CPU attention and factorisations are added to what the counter knows).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from flows.config import CompressConfig

SAMPLE_SECONDS = 0.05
WORKER = "ray::Worker"
"""How the command line of a worker's process begins."""
CALIBRATION, EVALUATION = "pydoc:calibrate", "pydoc:evaluate"


def configuration(
    model: Path, folder: Path, *, windows: int, length: int, budget: float, control: bool
) -> CompressConfig:
    return CompressConfig.model_validate(
        {
            "run": {
                "model": str(model),
                "calibration": {"source": CALIBRATION, "num_windows": windows, "length": length},
            },
            "plan": {"budget_bits": budget},
            "evaluation": {"source": EVALUATION, "num_windows": windows, "length": length, "control": control},
            "cluster": {"workers": 1, "device": "cpu"},
            "output": str(folder / "output"),
            "store": str(folder / "store"),
        },
        strict=False,
    )


class Stages:
    """Progress that knows which stage is running, and how long each took."""

    def __init__(self, on_change: Callable[[str, str], None] = lambda event, name: None) -> None:
        self.running: str | None = None
        self.on_change = on_change
        self.seconds: dict[str, float] = {}

    def stage(self, name: str, total: int, unit: str = "block") -> None:
        self.running = name
        self.on_change("begin", name)

    def advance(self, name: str, detail: str = "") -> None:
        pass

    def done(self, name: str, *, seconds: float, reused: bool) -> None:
        self.seconds[name] = seconds
        self.on_change("end", name)
        self.running = None

    def note(self, text: str) -> None:
        print(f"note: {text}", file=sys.stderr)

    def tell(self, text: str) -> None:
        print(text, file=sys.stderr)


class InlinePool:
    """One worker that is this process: the same calls, so that what they compute can be counted."""

    def __init__(self, threads: int, kept_bytes: int) -> None:
        from tasks.worker import Place, WorkerState

        place = Place(index=0, num_workers=1, epoch=0)
        self.state = WorkerState(device="cpu", threads=threads, kept_bytes=kept_bytes, place=place)
        self.losses: list[str] = []

    def __len__(self) -> int:
        return 1

    def submit(self, worker: int, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(self.state, *arguments)

    submit_beside = submit_passing = submit

    def each(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        return [function(self.state, *arguments)]

    each_refs = each

    def get(self, references: Sequence[Any]) -> list[Any]:
        return list(references)

    def map(
        self, function: Callable[..., Any], items: Sequence[tuple[Any, ...]], *, overlap: bool = False
    ) -> Iterator[tuple[int, Any]]:
        for position, arguments in enumerate(items):
            yield position, function(self.state, *arguments)


def counter() -> Any:
    """Counts by operation, with PyTorch's formulas and those that they lack.

    Lacking are in-place products, the CPU's attention kernel and factorisations. Not PyTorch's own mode, whose module
    tracker raises where gradients are asked for at a leaf.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

    aten = torch.ops.aten

    def shapes(arguments: tuple[Any, ...]) -> list[Any]:
        return [x.shape if isinstance(x, torch.Tensor) else x for x in arguments]

    formulas: dict[Any, Callable[..., int]] = {
        aten.addmm_: lambda _, a, b: 2 * a[0] * a[1] * b[1],
        aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop_count,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop_count,
        aten.linalg_cholesky_ex: lambda a: math.prod(a[:-2]) * a[-1] ** 3 // 3,
        aten.cholesky_solve: lambda b, a: math.prod(a[:-2]) * 2 * a[-1] ** 2 * b[-1],
    }
    takes = {aten._scaled_dot_product_flash_attention_for_cpu: 3, aten.linalg_cholesky_ex: 1, aten.cholesky_solve: 2}
    takes |= {aten._scaled_dot_product_flash_attention_for_cpu_backward: 4, aten.addmm_: 3}

    class Counter(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.counts: dict[str, int] = {}

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            packet = function._overloadpacket
            found = 0
            if packet in formulas:
                found = formulas[packet](*shapes(args)[: takes[packet]])
            elif packet in flop_registry:
                found = flop_registry[packet](*args, **(kwargs or {}), out_val=out)
            if found:
                self.counts[str(packet)] = self.counts.get(str(packet), 0) + int(found)
            return out

    return Counter()


def count(config: CompressConfig) -> dict[str, Any]:
    """FLOPs of every stage."""
    import torch

    from flows.compress import run_compress

    torch.set_num_threads(2)
    found: dict[str, dict[str, int]] = {}
    with counter() as counting:
        before: dict[str, int] = {}

        def change(event: str, name: str) -> None:
            if event == "begin":
                before.clear()
                before.update(counting.counts)
                return
            found[name] = {op: n - before.get(op, 0) for op, n in counting.counts.items() if n != before.get(op, 0)}

        run_compress(config, Stages(change), pool=InlinePool(1, 1 << 40))  # type: ignore[arg-type]
    return {"flops": {name: sum(ops.values()) for name, ops in found.items()}, "operations": found}


class Sampler(threading.Thread):
    """Peak memory of the Ray worker by stage: its own pages, and Ray's shared ones that it has touched."""

    def __init__(self, stages: Stages) -> None:
        super().__init__(daemon=True)
        self.stages = stages
        self.peaks: dict[str, int] = {}
        self.before: dict[str, int] = {}
        """As the stage begins."""
        self.shared: dict[str, int] = {}
        self.cpu_seconds: dict[str, float] = {}
        self._at: tuple[str, float] | None = None
        self.ended = threading.Event()

    def run(self) -> None:
        import psutil

        worker: psutil.Process | None = None
        while not self.ended.wait(SAMPLE_SECONDS):
            stage = self.stages.running
            if stage is None:
                continue
            if worker is None:
                below = psutil.Process().children(recursive=True)
                worker = next((p for p in below if " ".join(_command(p)).startswith(WORKER)), None)
            if worker is not None:
                own, shared = _memory(worker.pid)
                self._count(stage, worker)
                self.before.setdefault(stage, own)
                self.peaks[stage] = max(self.peaks.get(stage, 0), own)
                self.shared[stage] = max(self.shared.get(stage, 0), shared)

    def _count(self, stage: str, worker: Any) -> None:
        """Processor time of the worker since the sample before goes to the stage that is running."""
        import psutil

        try:
            times = worker.cpu_times()
        except psutil.NoSuchProcess:
            return
        now = times.user + times.system
        if self._at is not None and self._at[0] == stage:
            self.cpu_seconds[stage] = self.cpu_seconds.get(stage, 0.0) + now - self._at[1]
        self._at = stage, now


def _memory(pid: int) -> tuple[int, int]:
    """Resident bytes of a process: anonymous and of files, and shared memory."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0, 0
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss")}
    return found.get("RssAnon", 0) + found.get("RssFile", 0), found.get("RssShmem", 0)


def _command(process: Any) -> list[str]:
    import psutil

    try:
        return list(process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return []


def measure(config: CompressConfig) -> dict[str, Any]:
    """Seconds and the worker's peak memory by stage, bytes and objects of the store, bytes of the checkpoint."""
    from flows.compress import run_compress

    stages = Stages()
    sampler = Sampler(stages)
    sampler.start()
    started = time.monotonic()
    manifest = run_compress(config, stages)
    seconds = time.monotonic() - started
    sampler.ended.set()
    sampler.join()
    objects = [p for p in Path(config.store).rglob("*") if p.is_file()]
    by_stage: dict[str, int] = {}
    for path in objects:
        parts = path.relative_to(config.store).parts
        name = parts[1] if len(parts) > 2 else "run"
        by_stage[name] = by_stage.get(name, 0) + path.stat().st_size
    return {
        "seconds": stages.seconds,
        "wall_seconds": seconds,
        "peak_bytes": sampler.peaks,
        "bytes_before": sampler.before,
        "cpu_seconds": sampler.cpu_seconds,
        "load_average": os.getloadavg()[1],
        "shared_bytes": sampler.shared,
        "store_bytes": by_stage,
        "store_objects": len(objects),
        "checkpoint_bytes": manifest["budget"]["reached_bytes"],
        "choices": {m["name"]: [m["bits"], m["group_size"]] for m in manifest["modules"]},
    }


def write_synthetic(folder: Path, tokenizer: Path) -> Path:
    """A random Llama of 8 blocks, hidden size 2048, narrow in its MLP, with the tokenizer of another model."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    own = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=len(own),
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder)
    own.save_pretrained(folder)
    return folder


def predicted(described: Path, config: CompressConfig) -> dict[str, Any]:
    from flows.estimating import asked_of, this_cluster, this_machine
    from lrpq.model.described import DescribedModel
    from tasks.estimate.report import estimate

    source = DescribedModel(described)
    machine = this_machine(config.run.threads, config.store, again=False, say=lambda text: print(text, file=sys.stderr))
    return estimate(source, asked_of(config, source), this_cluster(machine, config)).document()


def show_measured(found: dict[str, Any]) -> None:
    planned = {stage["stage"]: stage for stage in found["planned"]["stages"]}
    print(
        f"{'stage':12} {'seconds':>21} {'of processor':>13} {'ratio':>6} {'peak MB':>17} {'ratio':>6} {'MB before':>10}"
    )
    totals = [0.0, 0.0, 0.0]
    for name, stage in planned.items():
        if name not in found["peak_bytes"] or not stage["seconds"]:
            continue
        wall, cpu, peak = found["seconds"][name], found["cpu_seconds"].get(name, 0.0), found["peak_bytes"][name]
        totals = [a + b for a, b in zip(totals, (stage["seconds"], wall, cpu), strict=True)]
        print(
            f"{name:12} {stage['seconds']:10.1f} {wall:10.1f} {cpu:13.1f} {stage['seconds'] / wall:6.2f} "
            f"{stage['host_bytes'] / 1e6:8.0f} {peak / 1e6:8.0f} {stage['host_bytes'] / peak:6.2f} "
            f"{found['bytes_before'][name] / 1e6:10.0f}"
        )
    if not found["peak_bytes"]:
        raise SystemExit(f"no process {WORKER} was seen: memory was not measured")
    largest = max(found["peak_bytes"].values())
    host = found["planned"]["host_bytes"]
    print(
        f"{'all':12} {totals[0]:10.1f} {totals[1]:10.1f} {totals[2]:13.1f} {totals[0] / totals[1]:6.2f} "
        f"{host / 1e6:8.0f} {largest / 1e6:8.0f} {host / largest:6.2f}   load {found['load_average']:.1f}"
    )
    for what, plan, real in (
        ("store bytes", found["planned"]["store_bytes"], sum(found["store_bytes"].values())),
        ("store objects", found["planned"]["store_objects"], found["store_objects"]),
        ("checkpoint bytes", found["planned"]["checkpoint_bytes"], found["checkpoint_bytes"]),
    ):
        print(f"{what:20} planned {plan:.0f}, measured {real}, ratio {plan / real:.3f}")


def show_counted(found: dict[str, Any]) -> None:
    print(f"{'stage':12} {'planned GFLOP':>14} {'counted GFLOP':>14} {'ratio':>6}")
    planned = {stage["stage"]: stage["flops"] for stage in found["planned"]["stages"] if stage["flops"]}
    for name, flops in planned.items():
        real = found["flops"][name]
        print(f"{name:12} {flops / 1e9:14.1f} {real / 1e9:14.1f} {flops / real:6.3f}")
    plan, real = sum(planned.values()), sum(found["flops"][name] for name in planned)
    print(f"{'all':12} {plan / 1e9:14.1f} {real / 1e9:14.1f} {plan / real:6.3f}")


SHOWN = {"measure": show_measured, "count": show_counted}


def child(kind: str, config: CompressConfig, target: Path) -> None:
    found = {"count": count, "measure": measure}[kind](config)
    target.write_text(json.dumps(found), encoding="utf-8")


def run_child(kind: str, config: CompressConfig, folder: Path) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)  # the calibration of a new machine measured its disk there
    (folder / "config.json").write_text(config.model_dump_json(), encoding="utf-8")
    target = folder / "found.json"
    command = [sys.executable, "-m", "benchmarks.plan", "--child", kind, str(folder / "config.json"), str(target)]
    subprocess.run(command, check=True)
    found: dict[str, Any] = json.loads(target.read_text(encoding="utf-8"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--synthetic", action="store_true")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--budget", type=float, default=3.25)
    parser.add_argument("--no-control", action="store_true", help="leave the control's refinement out")
    parser.add_argument("--count", type=int, nargs=2, default=(4, 128), metavar=("WINDOWS", "LENGTH"))
    parser.add_argument("--only", choices=("count", "measure"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, metavar=("CONFIG", "TARGET"), help=argparse.SUPPRESS)
    if "--child" in sys.argv:
        kind, config, target = sys.argv[sys.argv.index("--child") + 1 :]
        loaded = CompressConfig.model_validate_json(Path(config).read_text(encoding="utf-8"))
        child(kind, loaded, Path(target))
        return
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lrpq-plan-") as parent:
        model = arguments.model
        if arguments.synthetic:
            model = write_synthetic(Path(parent) / "model", arguments.model)
        described = Path(parent) / "described"  # what is planned from: nothing but config.json
        described.mkdir()
        shutil.copy(model / "config.json", described)
        found: dict[str, Any] = {"model": str(arguments.model), "synthetic": arguments.synthetic}
        for kind in ("measure", "count"):
            if arguments.only not in (None, kind):
                continue
            folder = Path(parent) / kind
            windows, length = arguments.windows, arguments.length
            if kind == "count":  # every operation is seen by Python: fewer tokens, planned for as many
                windows, length = arguments.count
            config = configuration(
                model, folder, windows=windows, length=length, budget=arguments.budget, control=not arguments.no_control
            )
            planned = predicted(described, config)
            found[kind] = run_child(kind, config, folder)
            found[kind]["planned"] = planned
            shutil.rmtree(folder)
            SHOWN[kind](found[kind])
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
