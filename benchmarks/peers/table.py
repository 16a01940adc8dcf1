"""The table, line by line as it is measured and as a whole."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.peers.rows import Row

HEADER = ("peer", "all-in bits", "perplexity", "KL +- se", "seconds", "peak MB")
WIDTHS = (16, 11, 10, 18, 7, 7)


def cells(row: Row) -> tuple[str, ...]:
    """One row's texts under HEADER; of a failed row, what was asked for and why there is no more."""
    if row.failed is not None:
        return row.peer, f"({row.target_bits:.3f})", f"failed: {row.failed}"
    return (
        row.peer,
        f"{row.all_in_bits:.3f}",
        f"{row.perplexity:.3f}",
        f"{row.kl_nats:.4f} +- " + ("?" if row.kl_standard_error is None else f"{row.kl_standard_error:.4f}"),
        f"{row.seconds:.1f}",
        "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}",
    )


def line(row: Row) -> str:
    """One row for a terminal; settings follow."""
    texts = cells(row)
    padded = "  ".join(text.ljust(width) for text, width in zip(texts, WIDTHS[: len(texts)], strict=True))
    told = ", ".join(f"{name} {value}" for name, value in {**row.versions, **row.settings}.items())
    return f"{padded}  {told}".rstrip()


def table(rows: Sequence[Row]) -> str:
    """All rows in Markdown, by the bits asked for; within them the lowest KL divergence first, failures last."""
    ordered = sorted(rows, key=lambda row: (row.target_bits, row.failed is not None, row.kl_nats or 0.0))
    lines = [HEADER, ("---",) * len(HEADER)]
    lines += [(*texts, *("",) * (len(HEADER) - len(texts))) for texts in map(cells, ordered)]
    return "\n".join(f"| {' | '.join(texts)} |" for texts in lines)
