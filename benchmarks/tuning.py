"""What tuning on the divergence adds to the refinement: KL on training, held-out and evaluation windows, and time.

    python -m benchmarks.tuning MODEL --calibration FILE --text FILE [--budget 3.25] [--epochs 4] [--json FILE]

Profile, allocation and refinement are the defaults of `lrpq compare`. All variants start from the same refined weights
and are scored by the evaluation of the pipeline. It is trained on `--tuning-windows` other windows of the calibration
text, or on the calibration windows where that is 0; the held-out windows are others again. `--rates` multiplies all
learning rates.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer

from lrpq.compare.prepared import Prepared
from lrpq.compare.recipes import DEFAULT
from lrpq.compare.terms import Terms
from lrpq.compare.workbench import Workbench
from lrpq.evaluate.divergence import score_windows
from lrpq.model.kept import KeptInputs
from lrpq.model.source import open_source
from lrpq.quant.grid import QuantizedWeight
from lrpq.tune.options import Trained, TuneOptions
from lrpq.tune.run import Epoch, Tuned, tune
from lrpq.tune.weights import dense_weights
from tasks.calibration.load import load_windows
from tasks.calibration.sources import parse_source

VARIANTS: Mapping[str, Trained] = {
    "scales": Trained.SCALES,
    "scales+vectors": Trained.SCALES | Trained.VECTORS,
    "scales+vectors+codes": Trained.SCALES | Trained.VECTORS | Trained.CODES,
    "vectors": Trained.VECTORS,
    "codes": Trained.CODES,
}


def kl(bench: Workbench, windows: Tensor, weights: Mapping[str, QuantizedWeight], vectors: Mapping[str, Tensor]) -> Any:
    """KL of every window, nats a token."""
    stream = bench.stream()
    dense = dense_weights(stream, weights, vectors)
    scores = score_windows(stream, windows, {"variant": dense.__getitem__}, micro_batch=bench.terms.micro_batch)
    return [score.kl_nats for score in scores["variant"]]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """Windows of the calibration text."""

    training: Tensor
    held_out: Tensor
    evaluation: Tensor


def run(
    bench: Workbench, texts: Texts, start: Mapping[str, QuantizedWeight], options: TuneOptions, *, resident: bool
) -> Tuned:
    """Tune, saying how every epoch went."""

    def said(number: int, epoch: Epoch) -> None:
        training = "" if epoch.training_kl is None else f"training {epoch.training_kl:.5f}  "
        print(f"    epoch {number}  {training}held-out {epoch.held_out_mean:.5f}", flush=True)

    with KeptInputs(memory_bytes=1 << 36) as kept:
        return tune(
            bench.stream(), texts.training, texts.held_out, start, options, kept=kept, resident=resident, on_epoch=said
        )


def scored(
    bench: Workbench, texts: Texts, weights: Mapping[str, QuantizedWeight], vectors: Mapping[str, Tensor]
) -> dict[str, list[float]]:
    return {
        "training": kl(bench, texts.training, weights, vectors),
        "evaluation": kl(bench, texts.evaluation, weights, vectors),
    }


def compared(
    bench: Workbench, texts: Texts, start: Mapping[str, QuantizedWeight], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows of the table: every variant at every multiple of the learning rates."""
    rows: list[dict[str, Any]] = []
    before = scored(bench, texts, start, {})
    for variant in arguments.variants:
        for multiple in arguments.rates:
            options = TuneOptions(
                trained=VARIANTS[variant], epochs=arguments.epochs, batch=arguments.batch, micro_batch=arguments.batch
            )
            options = replace(
                options,
                scale_rate=(arguments.scale_rate or options.scale_rate) * multiple,
                vector_rate=(arguments.vector_rate or options.vector_rate) * multiple,
                code_rate=(arguments.code_rate or options.code_rate) * multiple,
            )
            print(f"{variant}, rates x {multiple}", flush=True)
            began = time.perf_counter()
            result = run(bench, texts, start, options, resident=not arguments.streamed)
            seconds = time.perf_counter() - began
            after = scored(bench, texts, result.weights, result.vectors)
            rows.append(
                {
                    "variant": variant,
                    "rates": [options.scale_rate, options.vector_rate, options.code_rate],
                    "epochs": arguments.epochs,
                    "best_epoch": result.best_epoch,
                    "diverged": result.diverged,
                    "held_out_by_epoch": [epoch.held_out_mean for epoch in result.epochs],
                    "training_by_epoch": [epoch.training_kl for epoch in result.epochs],
                    "seconds": seconds,
                    "before": before,
                    "after": after,
                }
            )
            print(line(rows[-1], arguments.refine_seconds), flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(rows) + "\n", encoding="utf-8")
    return rows


def line(row: Mapping[str, Any], refine_seconds: float) -> str:
    """One row of the table."""
    held_out = row["held_out_by_epoch"]
    parts = [f"  best epoch {row['best_epoch']} of {row['epochs']}"]
    parts.append(f"held-out {held_out[0]:.5f} -> {held_out[row['best_epoch']]:.5f}")
    for which in ("training", "evaluation"):
        (a, _), (b, error) = mean_and_error(row["before"][which]), mean_and_error(row["after"][which])
        pairs = [y - x for x, y in zip(row["before"][which], row["after"][which], strict=True)]
        parts.append(
            f"{which} {a:.5f} -> {b:.5f} +- {error:.5f} (paired {b - a:+.5f} +- {mean_and_error(pairs)[1]:.5f})"
        )
    parts.append(
        f"{row['seconds']:.0f} s"
        + (f", {row['seconds'] / refine_seconds:.2f} of the refinement" if refine_seconds else "")
    )
    return "; ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--evaluation-windows", type=int, default=8)
    parser.add_argument("--tuning-windows", type=int, default=32)
    parser.add_argument("--held-out-windows", type=int, default=8)
    parser.add_argument("--budget", type=float, default=3.25)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS)[:3], choices=list(VARIANTS))
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--scale-rate", type=float)
    parser.add_argument("--vector-rate", type=float)
    parser.add_argument("--code-rate", type=float)
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0])
    parser.add_argument("--streamed", action="store_true", help="one block at a time on the device; the same results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    source, tokenizer = open_source(arguments.model), AutoTokenizer.from_pretrained(arguments.model)

    def windows(path: Path, number: int, seed: int, placement: str) -> Tensor:
        text = parse_source(f"text:{path}")
        return load_windows(
            text, tokenizer, num_windows=number, length=arguments.length, seed=seed, placement=placement
        ).tokens

    # one draw, so that no two windows overlap
    drawn = windows(
        arguments.calibration,
        arguments.windows + arguments.held_out_windows + arguments.tuning_windows,
        arguments.seed,
        "random",
    )
    tokens, rest = drawn[: arguments.windows], drawn[arguments.windows :]
    texts = Texts(
        training=rest[arguments.held_out_windows :] if arguments.tuning_windows else tokens,
        held_out=rest[: arguments.held_out_windows],
        evaluation=windows(arguments.text, arguments.evaluation_windows, 0, "spread"),
    )
    terms = Terms(seed=arguments.seed, device=arguments.device, shards=min(8, len(tokens)))
    bench = Workbench(source, tokens, terms)
    began = time.perf_counter()
    prepared = Prepared(bench, [DEFAULT], [arguments.budget])
    plan = prepared.plan(DEFAULT.allocation, arguments.budget).choices
    planned = time.perf_counter()
    start = bench.codes(plan, DEFAULT, prepared.gathered)
    arguments.refine_seconds = time.perf_counter() - planned
    print(f"profile, candidates, plan {planned - began:.0f} s, refinement {arguments.refine_seconds:.0f} s", flush=True)
    compared(bench, texts, start, arguments)


if __name__ == "__main__":
    main()
