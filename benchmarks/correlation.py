"""How well each measure of importance predicts what quantizing a module costs: Spearman correlation with measured KL.

    python -m benchmarks.correlation MODEL --calibration FILE [--windows 16] [--length 256] [--probe 2]
        [--draws 1] [--dtype float32] [--device cuda] [--json FILE]

Every module alone is quantized at 2 and at 3 bits (GPTQ on the original inputs), and the KL divergence of the model is
measured on two disjoint sets of windows of the calibration text that nothing was calibrated on. The correlation of the
two measurements with each other is the ceiling: no prediction can be asked to agree better with a measurement than
another measurement does. Predictions are compared with the mean of both. A model in bfloat16 differs from itself by
what rounding does (a KL of 1e-3 to float32, docs/log.md), which is in a measurement and in no prediction; in float32 it
is not. Needs neither Ray nor Prefect nor typer.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from transformers import AutoTokenizer

from lrpq.allocate.options import CostRow
from lrpq.compare.recipes import DEFAULT
from lrpq.compare.terms import Terms
from lrpq.compare.workbench import Gathered, Workbench
from lrpq.importance.directional import directional_costs
from lrpq.importance.equal_loss import equal_loss
from lrpq.importance.measured import noise_factors, one_at_a_time, relative_error
from lrpq.importance.probe import PROBE_WINDOWS
from lrpq.importance.registry import MEASURES, Measure
from lrpq.model.layers import Choice
from lrpq.model.source import open_source
from tasks.calibration.load import load_windows
from tasks.calibration.sources import parse_source
from tasks.resources import cut_of

GROUP_SIZE = 64
BITS = (2, 3)
CEILING = "measured again"
NOISE, DIRECTIONAL = "noise-factors", "directional"
PREDICTIONS: Mapping[str, Measure] = {
    **MEASURES,
    "equal-loss": Measure(source="BAQ", costs=equal_loss("none", at_bits=max(BITS)), weighting="none"),
    NOISE: Measure(source="HIGGS", costs=lambda e: [relative_error(e.W, q) for q in e.candidates]),
}
"""The measures that are formulas, and the two that need a width or measurements."""


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Correlation of ranks; ties share their mean rank. Not a number where one of the two is constant."""
    of_a, of_b = ranks(a), ranks(b)
    if not (np.ptp(of_a) and np.ptp(of_b)):
        return float("nan")
    return float(np.corrcoef(of_a, of_b)[0, 1])


def ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 1 on."""
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
    parser.add_argument("--draws", type=int, default=1, help="of labels, over which directional costs are averaged")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    started = time.monotonic()
    drawn = load_windows(
        parse_source(f"text:{arguments.calibration}"),
        AutoTokenizer.from_pretrained(arguments.model),
        num_windows=arguments.windows + 2 * arguments.probe,
        length=arguments.length,
        seed=arguments.seed,
    ).tokens
    if len(drawn) < arguments.windows + 2 * arguments.probe:
        raise SystemExit(f"{arguments.calibration}: {len(drawn)} windows; give a longer text, or fewer windows")
    tokens, probes = drawn[: arguments.windows], drawn[arguments.windows :].split(arguments.probe)
    source = open_source(arguments.model)
    cut = cut_of(
        device=arguments.device,
        num_windows=len(tokens),
        length=arguments.length,
        hidden=source.config.get_text_config().hidden_size,
    )
    terms = Terms(
        bits=BITS,
        group_sizes=(GROUP_SIZE,),
        seed=arguments.seed,
        dtype=getattr(torch, arguments.dtype),
        device=arguments.device,
        shards=cut.shards,
        micro_batch=cut.micro_batch,
    )
    bench = Workbench(source, tokens, terms)
    gathered = bench.gather(PREDICTIONS, weightings=(), candidates_by="blend", keep_candidates=True)
    print(f"{time.monotonic() - started:.0f} s: evidence gathered", flush=True)
    ours = gathered.costs[DEFAULT.allocation]
    gathered.costs[DIRECTIONAL] = along_errors(bench, gathered, ours, draws=arguments.draws)
    print(f"{time.monotonic() - started:.0f} s: errors walked back", flush=True)
    with_noise(bench, gathered)
    print(f"{time.monotonic() - started:.0f} s: noise measured", flush=True)
    measured = []
    for probe in probes:
        measured.append(
            one_at_a_time(
                bench.stream(),
                probe,
                lambda spec: gathered.candidates[spec.name],
                terms.choices,
                micro_batch=min(terms.micro_batch, arguments.probe),
            )
        )
        print(f"{time.monotonic() - started:.0f} s: modules measured", flush=True)
    rows = [row for bits in BITS for row in table(bits, measured, gathered.costs, gathered.scores)]
    print(markdown(rows), flush=True)
    if arguments.json:
        settings = {name: value if isinstance(value, int) else str(value) for name, value in vars(arguments).items()}
        found = {"settings": settings, "modules": len(measured[0]), "seconds": time.monotonic() - started, "rows": rows}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def along_errors(bench: Workbench, gathered: Gathered, rows: Sequence[CostRow], *, draws: int) -> list[CostRow]:
    """Directional costs of the same modules and choices, means over some draws of labels."""
    found = [
        directional_costs(
            bench.stream(),
            bench.tokens,
            lambda spec: gathered.candidates[spec.name],
            seed=bench.terms.seed + draw,
            micro_batch=bench.terms.micro_batch,
        )
        for draw in range(draws)
    ]
    return [
        replace(row, cost_nats=fmean(of_draw[row.module.name][row.choice] for of_draw in found))
        for row in rows
        if row.choice is not None
    ]


def with_noise(bench: Workbench, gathered: Gathered) -> None:
    """Turn relative errors into HIGGS' costs, in place: times the KL per relative error of each module."""
    terms = bench.terms
    factors = noise_factors(bench.stream(), bench.tokens[:PROBE_WINDOWS], seed=terms.seed)
    gathered.costs[NOISE] = [
        replace(row, cost_nats=row.cost_nats * factors[row.module.name]) for row in gathered.costs[NOISE]
    ]


def table(
    bits: int,
    measured: Sequence[Mapping[str, Mapping[Choice, float]]],
    costs: Mapping[str, Sequence[CostRow]],
    scores: Mapping[str, Mapping[str, float]],
) -> list[dict[str, object]]:
    """One row a measure, the ceiling first; modules whose rows the group does not divide are left out."""
    choice = Choice(bits=bits, group_size=GROUP_SIZE)
    names = sorted(name for name, of_module in measured[0].items() if choice in of_module)
    first, second = ([kl[name][choice] for name in names] for kl in measured)
    both = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    ceiling = spearman(first, second)
    rows: list[dict[str, object]] = [{"bits": bits, "measure": CEILING, "spearman": ceiling, "below_ceiling": 0.0}]
    for measure in (*costs, *scores):
        if measure in scores:
            predicted = [scores[measure][name] for name in names]
        else:
            found = {row.module.name: row.cost_nats for row in costs[measure] if row.choice == choice}
            predicted = [found[name] for name in names]
        value = spearman(predicted, both)
        rows.append({"bits": bits, "measure": measure, "spearman": value, "below_ceiling": ceiling - value})
    return rows


def markdown(rows: Sequence[Mapping[str, object]]) -> str:
    """A line a measure, a pair of columns a width; best first at the narrowest width."""
    found = {(row["bits"], row["measure"]): row for row in rows}
    widths = sorted({int(str(row["bits"])) for row in rows})
    head = [part for bits in widths for part in (f"{bits} bits", "below the ceiling")]
    lines = [f"| measure | {' | '.join(head)} |", "|---" * (1 + len(head)) + "|"]
    names = list(dict.fromkeys(str(row["measure"]) for row in rows))
    names.sort(key=lambda name: float(str(found[widths[0], name]["below_ceiling"])))
    for name in (CEILING, *(name for name in names if name != CEILING)):
        values = [found[bits, name][part] for bits in widths for part in ("spearman", "below_ceiling")]
        lines.append(f"| {name} | {' | '.join(f'{value:+.3f}' for value in values)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
