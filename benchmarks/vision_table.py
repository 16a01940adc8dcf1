"""Tables from what benchmarks/vision.py wrote with --json, of one model, one seed a run or many.

    python -m benchmarks.vision_table FILE [FILE ..] [--base lrpq]

The drop of top-1 in points, mean and spread over the calibration seeds; KL against the original; differences of every
row from ``--base`` and of mixed from fixed widths, both paired: the same calibration images, the same test images. A
difference has its standard error over the seeds, and that of the test images, which all seeds share, is not in it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Cells = Mapping[tuple[str, str], Mapping[int, Mapping[str, Any]]]
"""(row, column) -> seed -> result."""


def gathered(results: Iterable[Mapping[str, Any]]) -> Cells:
    """A cell that was measured twice has its last result."""
    cells: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
    for result in results:
        cells.setdefault((result["row"], result["column"]), {})[result["seed"]] = result
    return cells


def drop(result: Mapping[str, Any]) -> float:
    """Points of top-1."""
    return 100 * float(result["original_top1"] - result["top1"])


def table(title: str, cells: Cells, show: Callable[[Sequence[Mapping[str, Any]]], str]) -> None:
    """One row a row, one column a column, in the order in which they were measured."""
    rows, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    print(f"\n{title}\n| row | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for row in rows:
        shown = [show(list(cells[row, c].values())) if (row, c) in cells else "" for c in columns]
        print(f"| {row} | {' | '.join(shown)} |")


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation."""
    apart = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{apart}"


def paired(cells: Cells, ours: tuple[str, str], theirs: tuple[str, str]) -> None:
    """Prints how much more points and nats ours lose; nothing where one of both was not measured."""
    a, b = cells.get(ours, {}), cells.get(theirs, {})
    seeds = sorted(set(a) & set(b))
    if not seeds:
        return
    points = [drop(a[s]) - drop(b[s]) for s in seeds]
    nats = [math.log(a[s]["kl_nats"] / b[s]["kl_nats"]) for s in seeds]
    shown = []
    for values, digits in ((points, 2), (nats, 3)):
        error = f" +- {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}" if len(values) > 1 else ""
        shown.append(f"{statistics.fmean(values):+.{digits}f}{error}")
    print(f"| {' '.join(ours)} - {' '.join(theirs)} | {shown[0]} | {shown[1]} | {len(seeds)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--base", default="lrpq", help="row that others are compared with")
    options = parser.parse_args()
    report(gathered(r for file in options.files for r in json.loads(file.read_text(encoding="utf-8"))), options.base)


def report(cells: Cells, base: str) -> None:
    """Print all tables."""
    first = next(iter(next(iter(cells.values())).values()))
    table(
        f"drop of top-1 from {100 * first['original_top1']:.2f}%, points",
        cells,
        lambda found: spread([drop(r) for r in found], 2),
    )
    table("KL, nats", cells, lambda found: spread([r["kl_nats"] for r in found], 4))
    table("seconds to quantize, median", cells, lambda found: f"{statistics.median(r['seconds'] for r in found):.1f}")
    print("\n| paired difference of | points of drop | ln KL | seeds |\n|---|---|---|---|")
    columns = list(dict.fromkeys(column for _, column in cells))
    for row, column in cells:
        if row != base:
            paired(cells, (row, column), (base, column))
    for column in columns:
        if column.startswith("MP"):
            for row in dict.fromkeys(row for row, _ in cells):
                paired(cells, (row, column), (base, f"W{column[2:]}A{column[2:]}"))


if __name__ == "__main__":
    main()
