"""What a Hadamard rotation changes before anything is quantized, and what reading through it costs.

    python -m benchmarks.rotation MODEL --text FILE [--windows 8] [--length 512] [--json FILE]

The rotated model against the original, both unquantized: perplexity and KL divergence in float32 and bfloat16, with the
rotated weights as they are computed with and as a checkpoint would store them; the same for the original in bfloat16
against itself in float32. Then the error of folding in float32 instead of float64, and the time of reading.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from lrpq.evaluate.divergence import ORIGINAL, VARIANT, score_windows, summarize
from lrpq.model.source import open_source
from lrpq.model.streaming import BlockStream
from lrpq.transform.folds import Fold, RotateColumns, RotateLastRows, ScaleColumns, folded
from lrpq.transform.orthogonal import Hadamard, RotationKind, randomized_hadamard
from lrpq.transform.rotated import RotatedSource, Rotation, StoredRotatedSource
from lrpq.transform.rotation import RotationScope

ROTATION = Rotation(kind=RotationKind.HADAMARD, scope=RotationScope.RESIDUAL_AND_VALUES, seed=0)
WIDE, WIDER = 8192, 28672  # the MLP of Llama 3 70B


def single(fold: Fold) -> Fold:
    """The same fold in float32."""
    if isinstance(fold, ScaleColumns):
        return replace(fold, factor=fold.factor.float())
    if isinstance(fold, RotateColumns | RotateLastRows) and isinstance(fold.Q, Hadamard):
        Q = Hadamard(signs=fold.Q.signs.float(), factors=tuple(factor.float() for factor in fold.Q.factors))
        return replace(fold, Q=Q)
    return fold


def folding(rotated: RotatedSource) -> dict[str, float]:
    """Largest relative error of a tensor, and the share of bfloat16 values that are others."""
    worst = worst_stored = 0.0
    differing = total = 0
    for name in rotated.names():
        made = rotated._made[name]
        if not made.folds:
            continue
        stored = rotated._source.read(made.origin)
        exact = folded(stored, made.folds, dtype=torch.float64, name=name)
        values = stored.float()
        for fold in made.folds:
            values = single(fold)(values)
        worst = max(worst, float((values - exact).norm() / exact.norm()))
        worst_stored = max(worst_stored, float((rotated.read(name) - exact).norm() / exact.norm()))
        differing += int((values.bfloat16() != exact.bfloat16()).sum())
        total += values.numel()
    return {
        "float32_error": worst,
        "stored_error": worst_stored,
        "bfloat16_values_that_differ": differing / total,
    }


def seconds(W: Tensor, *folds: Fold) -> float:
    started = time.monotonic()
    folded(W, folds, dtype=torch.float32, name="w")
    return time.monotonic() - started


def reading() -> dict[str, float]:
    """Seconds to fold matrices of 8192 x 28672, by factors and by the whole matrix (of a 56th, times 56)."""
    Q = randomized_hadamard(WIDE, torch.Generator().manual_seed(0))
    W = torch.randn(WIDE, WIDER).bfloat16()
    part = W[:, : WIDER // 56].contiguous()
    return {
        "rows": seconds(W, RotateLastRows(Q=Q, num_rows=WIDE)),
        "columns": seconds(W.view(WIDER, WIDE), ScaleColumns(factor=torch.rand(WIDE).double()), RotateColumns(Q=Q)),
        "rows_by_the_matrix": 56 * seconds(part, RotateLastRows(Q=Q.dense(), num_rows=WIDE)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    source = open_source(arguments.model)
    rotated, stored = RotatedSource(source, ROTATION), StoredRotatedSource(source, ROTATION)
    size = arguments.windows * arguments.length
    text = arguments.text.read_text(encoding="utf-8")[: 20 * size]
    ids = AutoTokenizer.from_pretrained(arguments.model)(text, add_special_tokens=False, verbose=False).input_ids
    windows = torch.tensor(ids[:size]).view(arguments.windows, arguments.length)
    pairs: dict[str, tuple[torch.dtype, Any, torch.dtype]] = {
        "float32": (torch.float32, rotated, torch.float32),
        "float32, as stored": (torch.float32, stored, torch.float32),
        "bfloat16": (torch.bfloat16, rotated, torch.bfloat16),
        "original, bfloat16 against float32": (torch.float32, source, torch.bfloat16),
    }
    found: dict[str, Any] = {"added_bytes": rotated.added_bytes}
    for name, (dtype, other, other_dtype) in pairs.items():
        stream = BlockStream(source, dtype=dtype)
        scores = score_windows(stream, windows, {VARIANT: lambda _: {}}, other=BlockStream(other, dtype=other_dtype))
        summary = {variant: summarize(rows) for variant, rows in scores.items()}
        print(
            f"{name}: perplexity {summary[ORIGINAL].perplexity:.5f}, rotated {summary[VARIANT].perplexity:.5f}, KL "
            f"{summary[VARIANT].kl_nats:.2e} +- {summary[VARIANT].kl_standard_error or 0:.1e}",
            flush=True,
        )
        found[name] = {variant: asdict(row) for variant, row in summary.items()}
    found |= folding(rotated)
    started = time.monotonic()
    for name in source.names():
        source.read(name)
    found["read_seconds"] = time.monotonic() - started
    started = time.monotonic()
    for name in rotated.names():
        rotated.read_rows([name])
    found["rotated_read_seconds"] = time.monotonic() - started
    found["fold_8192_28672_seconds"] = reading()
    print(json.dumps({key: value for key, value in found.items() if key not in pairs}, indent=2))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
