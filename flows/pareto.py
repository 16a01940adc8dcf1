"""The Pareto plot of a comparison: KL divergence over all-in bits, as PNG and as data."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLUMNS = (
    *("budget_bits", "method", "seeds", "all_in_bits", "checkpoint_mb"),
    *("kl_nats", "kl_standard_error", "perplexity"),
)
DRAWN = ("lrpq", "control")
"""Drawn with lines; the others are marks."""


def is_on_front(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether no other row is as small and as close to the original, and better in one of the two."""
    return not any(
        other["all_in_bits"] <= row["all_in_bits"]
        and other["kl_nats"] <= row["kl_nats"]
        and (other["all_in_bits"] < row["all_in_bits"] or other["kl_nats"] < row["kl_nats"])
        for other in rows
    )


def write_pareto(rows: Sequence[Mapping[str, Any]], folder: Path) -> tuple[Path, Path]:
    """Write ``pareto.csv`` and ``pareto.png``; returns where they are."""
    data, picture = folder / "pareto.csv", folder / "pareto.png"
    with data.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow((*COLUMNS, "on_front"))
        for row in rows:
            writer.writerow((*(row[column] for column in COLUMNS), is_on_front(row, rows)))
    _draw(rows, picture)
    return data, picture


def _draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5.5), layout="constrained")
    markers = "osv^<>DPXdph8*"
    for index, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        found = sorted((r for r in rows if r["method"] == method), key=lambda r: r["all_in_bits"])
        axes.errorbar(
            [r["all_in_bits"] for r in found],
            [r["kl_nats"] for r in found],
            yerr=[r["kl_standard_error"] or 0.0 for r in found],
            label=method,
            marker=markers[index % len(markers)],
            markersize=5,
            linewidth=1.5,
            linestyle="-" if method in DRAWN else "none",
            capsize=2,
        )
    axes.set_yscale("log")
    axes.set_xlabel("all-in bits per quantized weight")
    axes.set_ylabel("KL divergence to the original, nats per token")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(fontsize="x-small", ncols=2)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
