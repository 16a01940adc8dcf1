"""Columns of a sweep with trellis codes, for CUDA devices: a block of threads a segment (kernels/trellis_source.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lrpq.kernels.loops import FARTHEST
from lrpq.kernels.nvrtc import compiled, launch
from lrpq.kernels.threads import on_device_of
from lrpq.kernels.trellis_source import SOURCE

if TYPE_CHECKING:
    from torch import Tensor

_THREADS = 128
"""Of a block. 64 take 1.5 to 1.6 times as long at 2 to 5 bits (docs/log.md)."""

_ROWS = 128
"""Of a segment, at most: each has a thread."""
_LEAF_COLUMNS = 16
"""Whose errors go to all later columns at once."""


def round_segments(
    T: Tensor,
    W: Tensor,
    S: Tensor,
    R: Tensor,
    weights: Tensor,
    runs: Tensor,
    book: Tensor,
    codes: Tensor,
    edges: Tensor,
    firsts: Tensor,
    *,
    most_columns: int,
    bits: int,
    edge_rows: int,
) -> None:
    """See `lrpq.kernels.trellis.round_segments`."""
    columns, rows = T.shape
    pointers = T, W, S, R, weights, runs, book, codes, edges, firsts
    with on_device_of(T):
        function = _function("round_segments", T, bits, edge_rows)
        launch(function, len(edges) - 1, _THREADS, [*pointers, columns, most_columns, rows, *R.stride()])


def round_blocks(
    W: Tensor,
    S: Tensor,
    R: Tensor,
    weights: Tensor,
    runs: Tensor,
    book: Tensor,
    codes: Tensor,
    edges: Tensor,
    pulls: Tensor,
    places: Tensor,
    *,
    bits: int,
    edge_rows: int,
) -> None:
    """See `lrpq.kernels.trellis.round_blocks`."""
    columns, rows = W.shape
    segments = len(edges) - 1
    pitch = -(-columns // _LEAF_COLUMNS) * _LEAF_COLUMNS
    moved, errors = W.new_empty(rows, pitch), torch.zeros_like(W)
    done = torch.zeros(segments + 1, dtype=torch.int32, device=W.device)
    pointers = W, moved, errors, S, R, weights, runs, book, codes, edges, pulls, places, done
    with on_device_of(W):
        function = _function("round_blocks", W, bits, edge_rows)
        launch(function, segments, _THREADS, [*pointers, columns, segments, rows, pitch, *R.stride()])


def _function(name: str, like: Tensor, bits: int, edge_rows: int) -> Any:
    return compiled(SOURCE, name, macros(bits, edge_rows), like.device.index)


def macros(bits: int, edge_rows: int) -> tuple[tuple[str, str], ...]:
    """Of the source, for a width."""
    found = {
        "BITS": bits,
        "EDGE": edge_rows,
        "THREADS": _THREADS,
        "ROWS": _ROWS,
        "LEAF": _LEAF_COLUMNS,
        "FARTHEST": f"{float(FARTHEST)!r}f",
    }
    return tuple((key, str(value)) for key, value in found.items())
