"""How well each measure of importance predicts what quantizing a module costs: Spearman correlation with measured KL.

    python -m benchmarks.correlation MODEL --calibration FILE [--windows 16] [--length 256] [--probe 2] [--json FILE]

Every module alone is quantized at 2 and at 3 bits (GPTQ on the original inputs), and the KL divergence of the model is
measured on two disjoint sets of windows of the calibration text that nothing was calibrated on. The correlation of the
two measurements with each other is the ceiling: no prediction can be asked to agree better with a measurement than
another measurement does. Predictions are compared with the mean of both.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from lrpq.compare.terms import Terms
from lrpq.compare.workbench import Workbench
from lrpq.importance.measured import one_at_a_time
from lrpq.importance.registry import MEASURES
from lrpq.model.layers import Choice
from lrpq.model.source import open_source
from tasks.calibration.load import load_windows
from tasks.calibration.sources import parse_source

GROUP_SIZE = 64
BITS = (2, 3)


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Correlation of ranks; ties share their mean rank."""
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def ranks(values: Sequence[float]) -> np.ndarray:
    _, places, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[places]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--probe", type=int, default=2, help="windows in each of the two measurements")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    drawn = load_windows(
        parse_source(f"text:{arguments.calibration}"),
        AutoTokenizer.from_pretrained(arguments.model),
        num_windows=arguments.windows + 2 * arguments.probe,
        length=arguments.length,
        seed=arguments.seed,
    ).tokens
    tokens, probes = drawn[: arguments.windows], drawn[arguments.windows :].split(arguments.probe)
    terms = Terms(bits=BITS, group_sizes=(GROUP_SIZE,), seed=arguments.seed, device=arguments.device)
    bench = Workbench(open_source(arguments.model), tokens, terms)
    gathered = bench.gather(MEASURES, weightings=(), candidates_by="blend", keep_candidates=True)
    print("evidence gathered", flush=True)
    measured = [
        one_at_a_time(bench.stream(), probe, lambda spec: gathered.candidates[spec.name], terms.choices)
        for probe in probes
    ]
    rows = [row for bits in BITS for row in table(bits, measured, gathered.costs, gathered.scores)]
    for row in rows:
        print(f"{row['bits']} bits  {row['measure']:24} {row['spearman']:+.3f}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def table(bits: int, measured: Sequence[Mapping], costs: Mapping, scores: Mapping) -> list[dict[str, object]]:
    choice = Choice(bits=bits, group_size=GROUP_SIZE)
    names = sorted(measured[0])
    first, second = ([kl[name][choice] for name in names] for kl in measured)
    both = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    rows: list[dict[str, object]] = [{"bits": bits, "measure": "measured again", "spearman": spearman(first, second)}]
    for measure in MEASURES:
        if measure in scores:
            predicted = [scores[measure][name] for name in names]
        else:
            found = {row.module.name: row.cost_nats for row in costs[measure] if row.choice == choice}
            predicted = [found[name] for name in names]
        rows.append({"bits": bits, "measure": measure, "spearman": spearman(predicted, both)})
    return rows


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
