"""Every supported architecture through the whole job, on tiny random models: mechanics, not quality.

    python -m benchmarks.families [--only NAME ...] [--json FILE]

For each: whether the streamed forward equals the model's own bit for bit in float32 (experts by transformers' ``eager``
loop); the largest difference of a logit between the reloaded checkpoint and the dense model with the dequantized
weights (the proof that every run makes, made again here); bytes of the weight files beside the original's;
seconds of all stages on one CPU worker, evaluation among them.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from flows.compress import run_compress
from flows.config import CompressConfig
from flows.prefect_server import prefect_api, quiet_prefect
from flows.progress import JsonlProgress
from lrpq.model.source import open_source
from lrpq.model.streaming import BlockStream
from tasks.cluster import Pool
from tasks.opening import open_pool
from tests.tiny_models import CASES, VOCABULARY, write_tiny, write_tokenizer

LENGTH = 24
BUDGET = 4.5


@dataclass(frozen=True)
class Row:
    """One architecture."""

    name: str
    architecture: str
    streamed_equals_own: bool
    reload_difference: float
    original_bytes: int
    compressed_bytes: int
    seconds: float


@torch.no_grad()
def streamed_equals_own(folder: Path) -> bool:
    own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if hasattr(own, "set_experts_implementation"):
        own.set_experts_implementation("eager")
    ids = torch.randint(3, VOCABULARY - 8, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    stream = BlockStream(open_source(folder), dtype=torch.float32)
    hidden = stream.embed(ids)
    for index, block in stream.stream(range(stream.num_blocks)):
        hidden = stream.run(block, index, hidden)
    with stream.head() as (tail, head):
        return bool(torch.equal(head(tail(hidden)), own(input_ids=ids, use_cache=False).logits))


def measure(name: str, pool: Pool, folder: Path) -> Row:
    model = write_tiny(folder / name, name)
    write_tokenizer(model)
    started = time.monotonic()
    manifest = run_compress(
        CompressConfig.model_validate(
            {
                "run": {
                    "model": str(model),
                    "calibration": {"source": "pydoc:calibrate", "num_windows": 12, "length": 48},
                    "candidates": {"group_sizes": [32]},
                    "dtype": "float32",
                    "shards": 4,
                    "micro_batch": 2,
                },
                "plan": {"budget_bits": BUDGET},
                "evaluation": {"num_windows": 4, "length": 48, "control": False},
                "cluster": {"workers": len(pool), "device": "cpu"},
                "output": folder / f"{name}-out",
                "store": str(folder / "store"),
            }
        ),
        JsonlProgress(open(os.devnull, "w")),  # noqa: SIM115 - as long as the process
        pool=pool,
    )
    seconds = time.monotonic() - started
    original = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    return Row(
        name=name,
        architecture=CASES[name].architecture,
        streamed_equals_own=streamed_equals_own(model),
        reload_difference=manifest["verified"]["max_abs_difference"],
        original_bytes=original,
        compressed_bytes=manifest["bytes"]["compressed"],
        seconds=seconds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted(CASES), default=list(CASES))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    quiet_prefect()
    rows = []
    with tempfile.TemporaryDirectory() as folder, prefect_api():
        with open_pool(device="cpu", workers=1, threads=1) as pool:
            for name in arguments.only:
                rows.append(measure(name, pool, Path(folder)))
                print(rows[-1], flush=True)
    print(
        "\n| case | architecture | streamed = own | reload = dense: largest difference | bytes / original | seconds |"
    )
    print("|---|---|---|---|---|---|")
    for row in rows:
        size = f"{row.compressed_bytes:,} / {row.original_bytes:,}"
        equal = "yes" if row.streamed_equals_own else "**no**"
        print(f"| {row.name} | {row.architecture} | {equal} | {row.reload_difference:g} | {size} | {row.seconds:.1f} |")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")
    if not all(row.streamed_equals_own for row in rows):
        raise SystemExit("a streamed forward differs from the model's own")


if __name__ == "__main__":
    main()
