"""lrpq beside uniform GPTQ, uniform GPTQ without activation order and round-to-nearest, on one ruler.

    python -m benchmarks.recipe MODEL --calibration FILE --text FILE --ruler SCRIPT [--budgets 3.25 4.25] [--json FILE]

Same model, same calibration tokens, same all-in bits. lrpq runs as a user runs it (``lrpq compress``); the uniform
checkpoints are made here from the core's functions, sequentially, site by site. The one with activation order and the
signed grid is the product's own control. Every checkpoint is written and measured by the ruler, a script that prints
one JSON line for REFERENCE CHECKPOINT --text FILE --windows N --length N.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoTokenizer

from benchmarks.peers.scoring import Ruler, ruler_command
from lrpq.checkpoint.assemble import write_checkpoint
from lrpq.model.layers import Choice
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.streaming import BlockStream
from lrpq.quant.factor import factorize
from lrpq.quant.gptq import gptq
from lrpq.quant.grid import Grid, QuantizedWeight
from lrpq.quant.hessian import normalized
from lrpq.quant.rtn import round_to_nearest
from lrpq.refine.products import merge_products
from lrpq.refine.sweep import RefineSweep
from lrpq.shards import root, split
from tasks.calibration.held_out import default_held_out, split_held_out
from tasks.calibration.load import load_windows
from tasks.calibration.sources import parse_source

SHARDS, MICRO_BATCH = 8, 4
GROUP_SIZE = 64


def uniform_gptq(
    source: ModelSource, tokens: torch.Tensor, choice: Choice, *, act_order: bool, grid: Grid
) -> dict[str, QuantizedWeight]:
    """Sequential GPTQ of every layer at one choice, damping 0.01, all tokens alike."""
    stream = BlockStream(source, dtype=torch.bfloat16)
    shards = {i: tokens[r.start : r.stop] for i, r in enumerate(split(len(tokens), SHARDS))}
    sweep = RefineSweep(stream, shards, num_shards=SHARDS, micro_batch=MICRO_BATCH, with_shift=False)
    sweep.embed()
    found: dict[str, QuantizedWeight] = {}
    for block, module in stream.stream(range(stream.num_blocks)):
        before: dict[str, torch.Tensor] = {}
        for site in stream.sites(block).values():
            products = root(sweep.products(block, module, site, None, before), SHARDS, merge_products)
            H = normalized(products.hessian)
            factor = factorize(H, act_order=act_order)
            searched_by = None if act_order else H  # the variance that GPTQ pays is of use in its own order alone
            for spec in site:
                found[spec.name] = gptq(stream.weight(spec), factor, [choice], grid=grid, H=searched_by)[0]
            before |= {spec.name: found[spec.name].dequantize(torch.bfloat16) for spec in site}
        sweep.advance(block, module, before)
    return found


def rounded(source: ModelSource, choice: Choice) -> dict[str, QuantizedWeight]:
    """Round-to-nearest at one choice."""
    stream = BlockStream(source, dtype=torch.bfloat16)
    return {spec.name: round_to_nearest(stream.weight(spec), choice, name=spec.name) for spec in stream.specs}


def lrpq_command(model: Path, arguments: argparse.Namespace, budget: float, output: Path) -> list[str]:
    return [
        *(
            sys.executable,
            "-m",
            "flows.cli",
            "compress",
            str(model),
            "--budget",
            str(budget),
            "--output",
            str(output),
            "--overwrite",
            "--json",
        ),
        *("--calibration", f"text:{arguments.calibration}", "--calibration-windows", str(arguments.windows)),
        *("--length", str(arguments.length), "--seed", str(arguments.seed)),
        *("--no-evaluate", "--store", str(arguments.work / "store"), "--relevance", arguments.relevance),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--ruler", type=Path, required=True)
    parser.add_argument("--budgets", type=float, nargs="+", default=[3.25, 4.25])
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--ruler-windows", type=int, default=32)
    parser.add_argument("--ruler-length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--relevance", default="blend")
    parser.add_argument("--only", nargs="+", default=["lrpq", "control", "symmetric", "plain", "rtn"])
    parser.add_argument("--work", type=Path, default=Path("results/recipe"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    model = arguments.model.absolute()
    source = ModelSource(model)
    drawn = load_windows(
        parse_source(f"text:{arguments.calibration}"),
        AutoTokenizer.from_pretrained(model),
        num_windows=arguments.windows + default_held_out(arguments.windows),
        length=arguments.length,
        seed=arguments.seed,
    )
    tokens = split_held_out(drawn, num_windows=arguments.windows)[0].tokens  # the windows lrpq calibrates on
    ruler = Ruler(
        command=ruler_command(arguments.ruler),
        text=arguments.text.absolute(),
        windows=arguments.ruler_windows,
        length=arguments.ruler_length,
        device="cpu",
    )
    rows: list[dict[str, object]] = []

    def report(method: str, budget: float, seconds: float, checkpoint: Path) -> None:
        rows.append({"method": method, "budget": budget, "seconds": seconds, **ruler.score(model, checkpoint)})
        row = rows[-1]
        print(
            f"{method:34} {row['all_in_bits']!s:>8} bits  perplexity {row['perplexity']!s:>8}  "
            f"KL {row['kl_nats_per_token']} +- {row['kl_standard_error']}  {seconds:6.0f} s",
            flush=True,
        )
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")

    def uniform(method: str, budget: float, make: Callable[[], dict[str, QuantizedWeight]]) -> None:
        started = time.monotonic()
        codes = make()
        output = arguments.work / f"{method.replace(' ', '-').replace(',', '')}-{budget}"
        choices = {name: weight.choice for name, weight in codes.items()}
        write_checkpoint(source, output, quantized=codes.get, choices=choices, manifest={}, overwrite=True)
        report(method, budget, time.monotonic() - started, output)

    for budget in arguments.budgets:
        choice = Choice(bits=int(budget), group_size=GROUP_SIZE)
        if "lrpq" in arguments.only:
            output = arguments.work / f"lrpq-{budget}"
            started = time.monotonic()
            subprocess.run(lrpq_command(model, arguments, budget, output), check=True, stdout=subprocess.DEVNULL)
            report("lrpq", budget, time.monotonic() - started, output)
        for name, grid in (("control", Grid.SIGNED), ("symmetric", Grid.SYMMETRIC)):
            if name in arguments.only:
                uniform(
                    f"uniform GPTQ, act order, {grid.value}",
                    budget,
                    lambda grid=grid, choice=choice: uniform_gptq(source, tokens, choice, act_order=True, grid=grid),
                )
        if "plain" in arguments.only:
            uniform(
                "uniform GPTQ, no act order",
                budget,
                lambda choice=choice: uniform_gptq(source, tokens, choice, act_order=False, grid=Grid.SYMMETRIC),
            )
        if "rtn" in arguments.only:
            uniform("round-to-nearest", budget, lambda choice=choice: rounded(source, choice))


if __name__ == "__main__":
    main()
