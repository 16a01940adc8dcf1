"""What one GPU makes of every stage, against what the same card can do in the same run.

    CUBLAS_WORKSPACE_CONFIG=:4096:8 python -m benchmarks.gpu [--only gptq,block] [--json FILE]

Parts (all of them without --only):

    ceiling      large products and copies; measured in every run, for the shares
    gptq         the matrices of a 70B block: factorisation, search, column loop, cost; loss; precision of the updates
    block        one block of the 8B, 70B and 405B shapes: profile and refinement, against necessary FLOPs (flops.py)

Needs PyTorch, transformers and lrpq's core; with --device cpu and --tiny it runs anywhere, on toy shapes. Weights and
inputs are random with outliers (matrices.py). A row that fails says so, and the exit status is 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from benchmarks.gpu import blocks, quantizer
from benchmarks.gpu.ceiling import measure_ceiling
from benchmarks.gpu.measure import release
from benchmarks.gpu.report import Report, Row
from benchmarks.gpu.shapes import LLAMA, TINY

Part = Callable[[Report, argparse.Namespace], None]


def gptq(report: Report, options: argparse.Namespace) -> None:
    shapes = quantizer.matrices_of(tiny=options.tiny)
    size = options.group_size
    quantizer.measure_quantizer(
        report, options.device, shapes, group_size=size, with_precision=not options.without_precision
    )


def block(report: Report, options: argparse.Namespace) -> None:
    known = TINY if options.tiny else LLAMA
    blocks.measure_blocks(report, options.device, [known[name] for name in options.shapes], windows(options))


def windows(options: argparse.Namespace) -> blocks.Windows:
    return blocks.Windows(
        windows=options.windows, length=options.length, shards=options.shards, micro_batch=options.micro_batch
    )


PARTS: Mapping[str, Part] = {"gptq": gptq, "block": block}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"parts, by commas: ceiling, {', '.join(PARTS)}")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--tiny", action="store_true", help="toy shapes, for machines without a GPU")
    parser.add_argument("--shapes", default="8B,70B,405B", type=lambda text: text.split(","))
    parser.add_argument("--windows", type=int, help="calibration windows; 128, or 8 with --tiny")
    parser.add_argument("--length", type=int, help="tokens a window; 2048, or 16 with --tiny")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--group-size", type=int, help="columns that share a scale; 128, or 32 with --tiny")
    parser.add_argument("--without-precision", action="store_true", help="of gptq: leave out the other precisions")
    parser.add_argument("--json", type=Path, help="where all rows are written, after each")
    parser.add_argument("--add", type=Path, nargs="*", default=[], help="files of earlier runs, for the whole model")
    options = parser.parse_args()
    options.windows = options.windows or (8 if options.tiny else 128)
    options.length = options.length or (16 if options.tiny else 2048)
    options.group_size = options.group_size or (32 if options.tiny else 128)
    options.named = [part for part in options.only.split(",") if part]
    unknown = [name for name in options.named if name not in ("ceiling", *PARTS)]
    if unknown:
        parser.error(f"--only {unknown[0]}: no such part; there are ceiling, {', '.join(PARTS)}")
    return options


def main() -> None:
    options = parsed()
    report = Report(options.device, options.json, tuple(options.add))
    report.say(f"{report.device_name}, torch {torch.__version__}")
    measure_ceiling(report, options.device, tiny=options.tiny)
    for name, part in PARTS.items():
        if options.named and name not in options.named:
            continue
        try:
            part(report, options)
        except torch.OutOfMemoryError as error:
            report.add(Row(part=name, name="out of memory", error=str(error).split(". ")[0]))
        release(options.device)
    raise SystemExit(1 if report.failed else 0)


if __name__ == "__main__":
    main()
