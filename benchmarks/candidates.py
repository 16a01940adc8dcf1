"""Seconds to make all candidates of SmolLM2-135M's shapes, against the floor set by the necessary arithmetic.

Synthetic weights, random correlated Hessians; the layers that share an input are stacked. Each worker is a
process with one thread, as a pipeline task is. Timed, for all widths: scale search, factorisation, column
loop, predicted cost. Wall seconds are those of the run; processor seconds (of a worker, both in the work and
in the matmul rate) are what a machine shared with other work still measures fairly.

    python -m benchmarks.candidates [--blocks 3] [--workers 2] [--json PATH]

Necessary FLOPs: column loop d_in^2 a row and choice (each error reaches each later column once: d_in^2/2
multiply-adds), predicted cost the same (a symmetric form), factorisation d_in^3/3. The floor divides them by
the best fp32 matmul rate that the same processes reach in the same run. The scale search has no matmul and
counts nothing towards the floor. The conventional count (dense form 2 d_in^2, Cholesky and triangular inverse
2/3 d_in^3) is shown too.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from lrpq.model.layers import Choice
from lrpq.quant.factor import Factor, factorize
from lrpq.quant.gptq import gptq, predicted_cost
from lrpq.quant.scale_search import search_scales_transposed

MODEL_BLOCKS = 30
BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZE = 64
PARTS = ("scale search", "factorisation", "column loop", "cost")


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Layers of one block that read the same input, stacked."""

    name: str
    d_out: int
    d_in: int

    def necessary_flops(self) -> float:
        """Arithmetic that no arrangement avoids."""
        return 2 * len(BITS) * self.d_out * self.d_in**2 + self.d_in**3 / 3

    def conventional_flops(self) -> float:
        """As usually counted: dense quadratic form, triangular inverse."""
        return 3 * len(BITS) * self.d_out * self.d_in**2 + 2 * self.d_in**3 / 3


SITES = (
    Site(name="gate_up", d_out=2 * 1536, d_in=576),
    Site(name="down", d_out=576, d_in=1536),
    Site(name="qkv", d_out=576 + 2 * 192, d_in=576),
    Site(name="o", d_out=576, d_in=576),
)

inputs: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}


def start_worker() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    for site in SITES:
        d_in = site.d_in
        mixing = torch.eye(d_in) + torch.randn(d_in, d_in, generator=generator) / d_in**0.5
        X = torch.randn(2 * d_in, d_in, generator=generator) @ mixing + torch.randn(2 * d_in, 1, generator=generator)
        W = 0.02 * torch.randn(site.d_out, d_in, generator=generator)
        inputs[site.name] = W, X.T @ X / len(X), torch.rand(site.d_out, generator=generator)


def make_candidates(site_name: str) -> dict[str, float]:
    """One site of one block; processor seconds of each part (one thread)."""
    W, H, curvature = inputs[site_name]
    choices = [Choice(bits=bits, group_size=GROUP_SIZE) for bits in BITS]
    marks = [time.process_time()]
    scales = search_scales_transposed(W.T.contiguous(), H.diagonal(), choices)
    marks.append(time.process_time())
    factor: Factor = factorize(H)
    marks.append(time.process_time())
    candidates = gptq(W, factor, choices, scales=scales)
    marks.append(time.process_time())
    predicted_cost(W, candidates, H, curvature)
    marks.append(time.process_time())
    return {part: marks[i + 1] - marks[i] for i, part in enumerate(PARTS)}


def matmul_rates(seconds: float, size: int = 1536) -> tuple[float, float]:
    """FLOP/s of fp32 matmuls in this process, by the wall clock and by processor time."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    out = torch.mm(a, b)
    count, start, busy = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds:
        torch.mm(a, b, out=out)
        count += 1
    flops = 2 * size**3 * count
    return flops / (time.perf_counter() - start), flops / (time.process_time() - busy)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--blocks", type=int, default=3, help=f"decoder blocks to run, scaled to {MODEL_BLOCKS}")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes of one thread each")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()

    os.environ["OMP_NUM_THREADS"] = "1"
    workers = arguments.workers
    work = [site.name for site in SITES for _ in range(arguments.blocks)]  # the largest first
    with multiprocessing.get_context("spawn").Pool(workers, initializer=start_worker) as pool:
        pool.map(make_candidates, ["o"] * workers, chunksize=1)  # warm-up
        rates = pool.map(matmul_rates, [1.0] * workers, chunksize=1)
        start = time.perf_counter()
        done = list(pool.imap_unordered(make_candidates, work, chunksize=1))
        wall = time.perf_counter() - start
        rates_after = pool.map(matmul_rates, [1.0] * workers, chunksize=1)

    scale = MODEL_BLOCKS / arguments.blocks
    necessary = MODEL_BLOCKS * sum(site.necessary_flops() for site in SITES)
    conventional = MODEL_BLOCKS * sum(site.conventional_flops() for site in SITES)
    processor = {part: scale * sum(seconds[part] for seconds in done) / workers for part in PARTS}
    clocks = {"wall": wall * scale, "processor": sum(processor.values())}
    result: dict[str, object] = {
        "blocks_run": arguments.blocks,
        "blocks_scaled_to": MODEL_BLOCKS,
        "workers": workers,
        "torch": torch.__version__,
        "bits": BITS,
        "group_size": GROUP_SIZE,
        "sites": [asdict(site) for site in SITES],
        "necessary_flops": necessary,
        "conventional_flops": conventional,
        "processor_seconds": processor,
    }
    print(f"{MODEL_BLOCKS} blocks, bits {BITS}, group {GROUP_SIZE}; {workers} workers of one thread")
    print("processor seconds of a worker:")
    for part, seconds in processor.items():
        print(f"  {part:<16} {seconds:7.2f}  {100 * seconds / clocks['processor']:5.1f} %")
    print("clock       seconds  GFLOP/s  floor s  ratio  conventional floor s, ratio")
    for i, (clock, total) in enumerate(clocks.items()):
        rate = max(sum(each[i] for each in measured) for measured in (rates, rates_after))
        floor, usual = necessary / rate, conventional / rate
        print(
            f"{clock:<10} {total:8.2f} {rate / 1e9:8.0f} {floor:8.2f} {total / floor:6.2f}"
            f" {usual:20.2f} {total / usual:7.2f}"
        )
        result[clock] = {
            "seconds": total,
            "matmul_flops_per_second": rate,
            "floor_seconds": floor,
            "ratio_to_floor": total / floor,
            "conventional_floor_seconds": usual,
            "ratio_to_conventional_floor": total / usual,
        }
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
