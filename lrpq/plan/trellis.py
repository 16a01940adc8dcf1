"""Work of trellis codes from shapes: what goes through Viterbi's algorithm, and what prepares and decodes it.

Every function here is named after the one whose work it counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from lrpq.kernels.trellis import EDGE_ROWS
from lrpq.plan.work import Work, matmul, work
from lrpq.quant.column_loop import halvings
from lrpq.quant.trellis import SEGMENT_ROWS, STATE_BITS
from lrpq.quant.trellis_loop import SCALES_TRIED, at_once, leaf_columns
from lrpq.quant.wavefront import COLUMNS

STEPS = "trellis-steps"
"""Kind of work, with the width behind it: ``trellis-steps:3``."""
SEGMENTS_AT_ONCE = 264
"""That a GPU goes down side by side: two a multiprocessor of an H100 or H200, as many as were timed together
(docs/log.md)."""
_FP32 = "float32"


def trellis_steps(found: Work) -> float:
    """Steps of all widths."""
    return sum(amount for kind, amount in found.amounts.items() if kind.split(":")[0] == STEPS)


def segments_of(parts: Sequence[int]) -> list[int]:
    """Rows of every segment, as ``segment_edges`` cuts layers of so many rows."""
    return [min(SEGMENT_ROWS, rows - first) for rows in parts for first in range(0, rows, SEGMENT_ROWS)]


def round_segments(parts: Sequence[int], columns: int, bits: int, *, cpu: bool, threads: int = 1) -> Work:
    """``kernels.trellis.round_segments``: rows that are gone down one after another, those around a segment's end twice
    more.

    On a CPU those of the thread that has most, on a GPU of the longest of the segments that run side by side.

    Args:
        parts: rows of the layers that lie one after the other.
        columns: one after another.
        bits: of a symbol.
        cpu: whether threads take segments, or one launch all.
        threads: of the CPU's worker.
    """
    dependent = _dependent([(rows, columns) for rows in segments_of(parts)], cpu=cpu, threads=threads)
    return Work(amounts={f"{STEPS}:{bits}": float(dependent)})


def _dependent(segments: Sequence[tuple[int, int]], *, cpu: bool, threads: int) -> int:
    """Rows that are gone down one after another for segments of so many rows and columns."""
    steps = [columns * (rows + 2 * min(rows, EDGE_ROWS)) for rows, columns in segments]
    if not cpu:
        return max(steps) * -(-len(steps) // SEGMENTS_AT_ONCE)
    num = min(threads, len(steps))
    edges = [len(steps) * i // num for i in range(num + 1)]  # as kernels.threads.in_threads has them
    return max(sum(steps[begin:end]) for begin, end in pairwise(edges))


def trellis_scales(d_out: int, d_in: int) -> Work:
    """``trellis_loop.trellis_scales``: magnitudes in units of their group's largest, squares, weighed; then what every
    scale cuts off, squared, weighed."""
    return work(wide=4.0 * (4 + 4 * SCALES_TRIED) * d_out * d_in)


def gptq_trellis(parts: Sequence[int], d_in: int, bits: int, *, cpu: bool, threads: int = 1) -> Work:
    """``trellis_loop.gptq_trellis`` of layers of so many rows, one after the other: W transposed, in order and copied,
    and the sweep."""
    return work(wide=4.0 * 3 * sum(parts) * d_in) + _sweep(parts, d_in, bits, cpu=cpu, threads=threads)


def descend_trellis(d_out: int, d_in: int, bits: int, *, cpu: bool, threads: int = 1) -> Work:
    """``trellis_loop.descend_trellis``: the product with H, the targets, H in order, and the sweep."""
    return (
        matmul(2.0 * d_out * d_in * d_in, dtype=_FP32, width=d_in)
        + decoded(d_out, d_in, bits)
        + work(wide=4.0 * d_in * (8 * d_out + 3 * d_in))
        + _sweep([d_out], d_in, bits, cpu=cpu, threads=threads)
    )


def _sweep(parts: Sequence[int], d_in: int, bits: int, *, cpu: bool, threads: int) -> Work:
    """Products in float32 on every device, those of one launch not counted, targets and weights in another unit,
    segments."""
    rows = sum(parts)
    propagated = sum(
        2.0 * (last - middle) * (middle - first)
        for first, middle, last in halvings(0, d_in, leaf_columns(d_in, rows, cpu=cpu))
        if middle < last
    )
    return (
        matmul(propagated * rows, dtype=_FP32, width=max(1, min(d_in // 4, rows)))
        + work(wide=4.0 * 2 * rows * d_in)
        + round_segments(parts, d_in, bits, cpu=cpu, threads=threads)
    )


def round_stream_blocks(chunks: Sequence[Sequence[int]], d_in: int, bits: int, *, cpu: bool, threads: int = 1) -> Work:
    """``wavefront.round_stream_blocks`` of chunks of blocks of so many rows, but for how blocks move each other:
    products to the right of all columns that are rounded, those of one launch not counted, and segments of the blocks
    that are at work in a step."""
    rows = sum(sum(sizes) for sizes in chunks)
    width = COLUMNS["cpu" if cpu else "cuda"]
    starts = range(0, d_in, width)
    propagated = sum(2.0 * max(0, d_in - first - width) * width for first in starts)
    places = [(size, behind) for sizes in chunks for behind, size in enumerate(sizes)]
    # in most steps all blocks are at work, so that few are unlike the others
    at_work = Counter(
        tuple(
            (size, min(width, d_in - (step - behind) * width))
            for size, behind in places
            if 0 <= step - behind < len(starts)
        )
        for step in range(len(starts) + max(behind for _, behind in places))
    )
    dependent = sum(
        times * _dependent([(r, k) for size, k in own for r in segments_of([size])], cpu=cpu, threads=threads)
        for own, times in at_work.items()
    )
    found = work(wide=4.0 * rows * d_in * 8) + Work(amounts={f"{STEPS}:{bits}": float(dependent)})
    if not cpu and at_once(d_in, rows):
        return found
    passed_on = work(wide=4.0 * rows * d_in * len(starts))  # every step's errors go to all columns to the right
    return found + passed_on + matmul(propagated * rows, dtype=_FP32, width=min(width, rows))


def decoded(d_out: int, d_in: int, bits: int) -> Work:
    """``trellis.values``, scaled: of every symbol that a state holds its code gathered, widened, counted from zero,
    shifted and added; then the state's last bits and its value."""
    symbols = -(-STATE_BITS // bits)
    return work(wide=float((17 * symbols + 12) * d_out * d_in))
