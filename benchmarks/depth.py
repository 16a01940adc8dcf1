"""Peak resident memory of profile and refinement against depth: it should not grow, the kept block inputs apart.

    python -m benchmarks.depth [--depths 8 64] [--json FILE]

Each measurement is a process of its own that streams a synthetic float32 Llama (hidden 512). The kept block inputs of
the profile are counted by the sweep and subtracted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lrpq.model.kept import KeptInputs
from lrpq.model.layers import Choice
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.streaming import BlockStream
from lrpq.refine.quantize import quantize_refined
from lrpq.refine.sweep import RefineSweep
from lrpq.relevance.composite import Relevance
from lrpq.relevance.sweep import ProfileSweep, Shard
from lrpq.shards import root

WINDOWS, LENGTH = 8, 128
CHOICE = Choice(bits=4, group_size=64)


def write_model(folder: Path, depth: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=depth,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=1024,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="200MB")


def resident_mb() -> float:
    """Peak resident memory of this process so far: its own, where ru_maxrss would remember the parent's."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def profile(stream: BlockStream, tokens: torch.Tensor) -> float:
    """Run the profile; returns the MB of block inputs it kept."""
    kept = KeptInputs(memory_bytes=1 << 40)
    shard = Shard(index=0, first_window=0, tokens=tokens)
    sweep = ProfileSweep(
        stream,
        [shard],
        num_shards=1,
        relevance=Relevance.BLEND,
        floor=0.03,
        power=0.5,
        seed=0,
        micro_batch=4,
        kept=kept,
    )
    sweep.embed()
    for index, block in stream.stream(range(stream.num_blocks)):
        sweep.forward(index, block)
    kept_mb = kept.held_bytes / 2**20
    sweep.seed_gradients()
    for index, block in stream.stream(range(stream.num_blocks - 1, -1, -1)):
        sweep.backward(index, block)
    return kept_mb


def refine(stream: BlockStream, tokens: torch.Tensor) -> float:
    """Run the refinement, which keeps only the inputs of the block at hand."""
    sweep = RefineSweep(stream, {0: tokens}, num_shards=1, micro_batch=4, with_shift=True)
    sweep.embed()
    for index, block in stream.stream(range(stream.num_blocks)):
        quantized: dict[str, torch.Tensor] = {}
        for site in stream.sites(index).values():
            products = root(sweep.products(index, block, site, None, quantized), 1, lambda a, b: a)
            new = {
                spec.name: quantize_refined(
                    stream.weight(spec), products, CHOICE, strength=0.5, name=spec.name
                ).weight.dequantize(stream.dtype)
                for spec in site
            }
            quantized |= new
        sweep.advance(index, block, quantized)
    return 0.0


STAGES = {"profile": profile, "refine": refine}


def child(stage: str, folder: Path) -> None:
    torch.set_num_threads(1)
    stream = BlockStream(ModelSource(folder), dtype=torch.float32)
    tokens = torch.randint(0, 1024, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(0))
    before = resident_mb()
    kept_mb = STAGES[stage](stream, tokens)
    print(json.dumps({"start_mb": before, "peak_mb": resident_mb(), "kept_mb": kept_mb}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, metavar=("STAGE", "MODEL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child[0], Path(arguments.child[1]))
        return
    rows = []
    with tempfile.TemporaryDirectory(prefix="lrpq-depth-") as parent:
        for depth in arguments.depths:
            folder = Path(parent) / str(depth)
            write_model(folder, depth)
            for stage in STAGES:
                command = [sys.executable, "-m", "benchmarks.depth", "--child", stage, str(folder)]
                found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                rows.append({"stage": stage, "blocks": depth, **found})
    print(f"{'stage':8} {'blocks':>6} {'start MB':>9} {'peak MB':>9} {'kept MB':>9} {'peak - kept MB':>15}")
    for row in sorted(rows, key=lambda r: (r["stage"], r["blocks"])):
        flat = row["peak_mb"] - row["kept_mb"]
        print(
            f"{row['stage']:8} {row['blocks']:6} {row['start_mb']:9.0f} {row['peak_mb']:9.0f} "
            f"{row['kept_mb']:9.1f} {flat:15.0f}"
        )
    for stage in STAGES:
        flat = [r["peak_mb"] - r["kept_mb"] for r in rows if r["stage"] == stage]
        print(f"{stage}: largest over smallest, kept inputs apart: {max(flat) / min(flat):.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
