"""Rows of a large layer in parts that are quantized one after the other, or by several workers at once.

Rows of different chunks of outputs do not see each other (relevance/outputs.py), and all else that a layer's rounding
does with a row needs that row and the site's sums alone. So parts that begin with a chunk are as good as the whole, and
each decides for itself whether making up for each other's errors has helped. What is cut depends on a layer's size
alone: products have the same shapes, and so the same bits, whoever computes them.
"""

from __future__ import annotations

from lrpq.relevance.outputs import CHUNK_ROWS, num_chunks

LEAST_ELEMENTS = 1 << 26
"""Weights of a layer that is cut: q and o of a 70B model have as many."""


def row_parts(d_out: int, d_in: int) -> tuple[slice, ...]:
    """Consecutive rows of a layer: two parts of whole chunks, of which the first has one more at most; or all rows."""
    chunks = num_chunks(d_out)
    if d_out * d_in < LEAST_ELEMENTS or chunks == 1:
        return (slice(0, d_out),)
    middle = CHUNK_ROWS * -(-chunks // 2)
    return slice(0, middle), slice(middle, d_out)
