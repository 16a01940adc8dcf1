"""What one GPU makes of every stage, against what the same card can do in the same run.

    CUBLAS_WORKSPACE_CONFIG=:4096:8 python -m benchmarks.gpu [--only gptq,block] [--json FILE]

Parts (all of them without --only):

    ceiling      large products and copies; measured in every run, for the shares
    gptq         the matrices of a 70B block: factorisation, search, column loop, cost; loss; precision of the updates;
                 with --model also the loss on that model's own weights and Hessians
    sums         Hessians and output moments of one micro-batch, and other products for them, against float64
    block        one block of the 8B, 70B and 405B shapes: profile and refinement, against necessary FLOPs (flops.py)
    candidates   the seven matrices of a 70B block at six widths and one group size
    quantize     the same refined: solve, column loop, blocks of rows, polish
    launches     what graphs, layers side by side and both streams together would save
    memory       peaks at 4 and at 16 blocks, and of a 70B block's refinement with its quantization
    growth       seconds against tokens, width and depth, with fitted exponents (--png draws them)
    peers        llm-compressor's and GPTQModel's GPTQ on the matrices of ``gptq``, where installed
    end-to-end   --model from tokens to a checkpoint through the workbench, and where the time goes
    total        minutes for the whole 70B model from the blocks of this run and of the files given with --add

Needs PyTorch, transformers and lrpq's core; with --device cpu and --tiny it runs anywhere, on toy shapes. Weights and
inputs are random with outliers (matrices.py). A row that fails says so, and the exit status is 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu import blocks, growth, launches, layers, memory, peers, pipeline, quantizer, real, sums, whole
from benchmarks.gpu.ceiling import measure_ceiling
from benchmarks.gpu.measure import release
from benchmarks.gpu.model import random_tokens
from benchmarks.gpu.report import Report, Row
from benchmarks.gpu.shapes import LLAMA, TINY, BlockShape, of_width
from lrpq.compare.recipes import DEFAULT
from lrpq.determinism import compute_deterministically

REAL_WINDOWS = 32
"""Windows for the Hessians of a real model."""
Part = Callable[[Report, argparse.Namespace], None]


def gptq(report: Report, options: argparse.Namespace) -> None:
    quantizer.measure_quantizer(
        report,
        options.device,
        options.matrices,
        group_size=options.group_size,
        with_precision=not options.without_precision,
    )
    if options.model is not None:
        real.measure_real(report, options.device, options.model, tokens_of(options)[:REAL_WINDOWS])


def summed(report: Report, options: argparse.Namespace) -> None:
    shape = seventy(options)
    sums.measure_sums(report, options.device, [shape.hidden, shape.ffn], tiny=options.tiny)


def block(report: Report, options: argparse.Namespace) -> None:
    known = TINY if options.tiny else LLAMA
    shapes = [known[name] for name in options.shapes]
    blocks.measure_blocks(
        report, options.device, shapes, windows(options), with_breakdown=not options.without_breakdown
    )


def candidates(report: Report, options: argparse.Namespace) -> None:
    layers.measure_candidates(report, options.device, seventy(options), group_size=options.group_size)


def launched(report: Report, options: argparse.Namespace) -> None:
    launches.measure_launches(report, options.device, tiny=options.tiny)


def quantize(report: Report, options: argparse.Namespace) -> None:
    layers.measure_quantize(report, options.device, seventy(options), refinement(options))


def peak(report: Report, options: argparse.Namespace) -> None:
    memory.measure_refinement(report, options.device, seventy(options), windows(options), refinement(options))
    grid = growth.TINY if options.tiny else growth.FULL
    shape = of_width(grid.base_width, head_width=grid.head_width)
    memory.measure_depths(report, options.device, shape, replace(windows(options), windows=grid.base_windows))


def grown(report: Report, options: argparse.Namespace) -> None:
    grid = growth.TINY if options.tiny else growth.FULL
    growth.measure_growth(
        report, options.device, grid, windows(options), group_size=options.group_size, png=options.png
    )


def compared(report: Report, options: argparse.Namespace) -> None:
    required = "peers" in options.named
    peers.measure_peers(report, options.device, options.matrices, group_size=options.group_size, required=required)


def end_to_end(report: Report, options: argparse.Namespace) -> None:
    if options.model is None:
        if "end-to-end" in options.named:
            report.add(Row(part="end-to-end", name="no model", error="give --model FOLDER"))
        else:
            report.say("end-to-end: not run without --model")
        return
    tokens = tokens_of(options)
    pipeline.measure_pipeline(
        report,
        options.device,
        options.model,
        tokens,
        budget_bits=options.budget,
        with_breakdown=not options.without_breakdown,
    )


def tokens_of(options: argparse.Namespace) -> Tensor:
    """Windows of --text, or random ones, which take as long but for what the quantizer makes of them."""
    count, length = (8, 16) if options.tiny else (options.windows, 1024)
    if options.text is None:
        return random_tokens(count, length)
    from transformers import AutoTokenizer

    from tasks.calibration.load import load_windows
    from tasks.calibration.sources import parse_source

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    source = parse_source(f"text:{options.text}")
    tokens: Tensor = load_windows(source, tokenizer, num_windows=count, length=length, seed=0).tokens
    return tokens


def total(report: Report, options: argparse.Namespace) -> None:
    whole.add_total(report, seventy(options))


def seventy(options: argparse.Namespace) -> BlockShape:
    return (TINY if options.tiny else LLAMA)["70B"]


def refinement(options: argparse.Namespace) -> layers.Refinement:
    return layers.Refinement(
        group_size=options.group_size,
        polish_rounds=options.polish_rounds,
        row_blocks=options.row_blocks,
        trellis=options.codes == "trellis",
    )


def windows(options: argparse.Namespace) -> blocks.Windows:
    return blocks.Windows(
        windows=options.windows,
        length=options.length,
        shards=options.shards,
        micro_batch=options.micro_batch,
        low_memory=options.low_memory,
    )


PARTS: Mapping[str, Part] = {
    "gptq": gptq,
    "sums": summed,
    "block": block,
    "candidates": candidates,
    "quantize": quantize,
    "launches": launched,
    "memory": peak,
    "growth": grown,
    "peers": compared,
    "end-to-end": end_to_end,
    "total": total,
}


def matrix(text: str) -> tuple[int, int]:
    """``8192x28672`` as (d_out, d_in)."""
    d_out, d_in = text.split("x")
    return int(d_out), int(d_in)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"parts, by commas: ceiling, {', '.join(PARTS)}")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--tiny", action="store_true", help="toy shapes, for machines without a GPU")
    parser.add_argument("--shapes", default="8B,70B,405B", type=lambda text: text.split(","))
    parser.add_argument(
        "--matrices", type=matrix, nargs="*", help="of gptq and peers: ROWSxCOLUMNS, those of a 70B block"
    )
    parser.add_argument("--windows", type=int, help="calibration windows; 128, or 8 with --tiny")
    parser.add_argument("--length", type=int, help="tokens a window; 2048, or 16 with --tiny")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument(
        "--low-memory", action="store_true", help="of block and memory: what is not at work waits in host memory"
    )
    parser.add_argument("--group-size", type=int, help="columns that share a scale; 128, or 32 with --tiny")
    parser.add_argument("--without-precision", action="store_true", help="of gptq: leave out the other precisions")
    parser.add_argument(
        "--without-breakdown", action="store_true", help="of block and end-to-end: no second run with timers"
    )
    parser.add_argument("--polish-rounds", type=int, default=DEFAULT.polish_rounds, help="of quantize")
    parser.add_argument("--row-blocks", type=int, default=DEFAULT.row_blocks, help="of quantize")
    parser.add_argument("--codes", default="uniform", choices=("uniform", "trellis"), help="of quantize")
    parser.add_argument("--png", type=Path, help="where growth is drawn")
    parser.add_argument("--model", type=Path, help="of end-to-end and gptq: a model folder")
    parser.add_argument("--text", type=Path, help="calibration text for --model; random tokens without it")
    parser.add_argument("--budget", type=float, default=3.25, help="of end-to-end: bits a weight")
    parser.add_argument("--json", type=Path, help="where all rows are written, after each")
    parser.add_argument("--add", type=Path, nargs="*", default=[], help="files of earlier runs, for the whole model")
    parser.add_argument(
        "--deterministic", action="store_true", help="PyTorch's deterministic algorithms, as in lrpq's workers"
    )
    options = parser.parse_args()
    options.windows = options.windows or (8 if options.tiny else 128)
    options.length = options.length or (16 if options.tiny else 2048)
    options.group_size = options.group_size or (32 if options.tiny else 128)
    options.matrices = options.matrices or quantizer.matrices_of(tiny=options.tiny)
    options.named = [part for part in options.only.split(",") if part]
    unknown = [name for name in options.named if name not in ("ceiling", *PARTS)]
    if unknown:
        parser.error(f"--only {unknown[0]}: no such part; there are ceiling, {', '.join(PARTS)}")
    return options


def main() -> None:
    options = parsed()
    if options.deterministic:  # before the report asks the GPU for its name
        compute_deterministically()
    report = Report(options.device, options.json, tuple(options.add))
    mode = ", deterministic algorithms" if options.deterministic else ""
    report.say(f"{report.device_name}, torch {torch.__version__}{mode}")
    measure_ceiling(report, options.device, tiny=options.tiny)
    release(options.device)
    for name, part in PARTS.items():
        if options.named and name not in options.named:
            continue
        report.attempt(name, "this part", partial(part, report, options))
        release(options.device)
    raise SystemExit(1 if report.failed else 0)


if __name__ == "__main__":
    main()
