"""Tables of ``lrpq compare``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One row a method and budget; of each budget the least KL in bold."""
    table = Table(title="on equal terms: same model, tokens, grid, activation order")
    for name in ("budget", "method"):
        table.add_column(name)
    for name in ("all-in bits", "MB", "KL, nats a token", "against lrpq", "perplexity", "seconds", "peak MB", "seeds"):
        table.add_column(name, justify="right")
    best = {b: min(r["kl_nats"] for r in rows if r["budget_bits"] == b) for b in {r["budget_bits"] for r in rows}}
    last = None
    for row in rows:
        if last is not None and row["budget_bits"] != last:
            table.add_section()
        last = row["budget_bits"]
        table.add_row(
            f"{row['budget_bits']:g}",
            row["method"],
            f"{row['all_in_bits']:.3f}",
            f"{row['checkpoint_mb']:.1f}",
            _with_error(row["kl_nats"], row["kl_standard_error"]),
            ""
            if row["against_lrpq"] is None
            else _with_error(row["against_lrpq"], row["against_lrpq_error"], sign="+"),
            f"{row['perplexity']:.2f}",
            f"{row['seconds']:.0f}",
            f"{row['peak_mb']:.0f}",
            str(row["seeds"]),
            style="bold" if row["kl_nats"] == best[row["budget_bits"]] else None,
        )
    said = [
        f"{row['method']} at {row['budget_bits']:g}: "
        + ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in row["counts"].items())
        for row in rows
        if row["counts"]
    ]
    table.caption = "\n".join(said) or None
    return table


def list_table(methods: Sequence[Mapping[str, str]]) -> Table:
    """All methods, where they are from and what they change."""
    table = Table(title="methods of `lrpq compare`")
    for name in ("method", "axis", "source"):
        table.add_column(name, overflow="fold")
    for method in methods:
        table.add_row(method["method"], method["axis"], method["source"])
    return table


def _with_error(value: float, error: float | None, *, sign: str = "") -> str:
    shown = f"{value:{sign}.4f}"
    return shown if error is None else f"{shown} ± {error:.4f}"
