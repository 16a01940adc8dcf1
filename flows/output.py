"""Standard output: a table for a person, or exactly one JSON document for a program."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

from rich.console import Console

UNKNOWN_WIDTH = 110
"""Columns where the output is no terminal: Rich's own 80 would wrap the tables of a log."""


def open_console() -> Console:
    """Return the console for tables."""
    console = Console()
    return console if console.is_terminal else Console(width=UNKNOWN_WIDTH)


def write_document(document: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write the one JSON document; what JSON has no number for (NaN, infinities) becomes null."""
    print(json.dumps(_finite(document), indent=2, allow_nan=False, default=str))  # noqa: T201
    sys.stdout.flush()


@contextmanager
def stdout_kept_free() -> Iterator[None]:
    """Send everything that is written to stdout inside to stderr, also by C libraries and child processes.

    Solvers and cluster runtimes print greetings; a program that reads our JSON must not see them.
    """
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
