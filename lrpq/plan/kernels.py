"""Work of the quantizer's functions from shapes, with the constants and the cuts of those functions themselves.

Every function here is named after the one whose work it counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lrpq.model.layers import Choice
from lrpq.plan import trellis
from lrpq.plan.work import COUNTED, NOTHING, Work, matmul, total, work
from lrpq.quant import column_loop, descent, gptq, halves, hessian, scale_search
from lrpq.quant import refit as refits
from lrpq.quant.grid import Grid, group_width
from lrpq.quant.polish import rounds_of
from lrpq.quant.row_feedback import IMPROVED_ELEMENTS, MOVED_AT_ONCE, blocks_of
from lrpq.quant.trellis import SEGMENT_ROWS, whole_segments
from lrpq.refine.quantize import ALONE_ELEMENTS
from lrpq.relevance.outputs import CHUNK_ROWS

FP32, BF16 = "float32", "bfloat16"
F32_BYTES = 4


def activation_sum(flops: float, *, width: int, split: bool, rounded: bool = False) -> Work:
    """``activation_sums.add_sum`` of as many FLOPs in fp32; ``split``: two products in bfloat16 take its place, or one
    where what is summed is rounded."""
    if not split:
        return matmul(flops, dtype=FP32, width=width)
    return matmul((1 if rounded else 2) * flops, dtype=BF16, width=width)


def precise(flops: float, *, width: int, cpu: bool) -> Work:
    """A product in fp32; on a GPU a large one is three of bfloat16 halves (``halves.add_product``)."""
    if cpu or flops < 2.0 * halves.LEAST_WORK:
        return matmul(flops, dtype=FP32, width=width)
    return matmul(3 * flops, dtype=BF16, width=width)


def triangle_flops(d_in: int, tokens: float, *, split: bool = False) -> float:
    """Products of ``hessian.accumulate``: row blocks from the diagonal to the right edge."""
    step = max(1, -(-d_in // hessian.NUM_BLOCKS), hessian.GPU_BLOCK_ROWS if split else 0)
    return sum(2.0 * tokens * min(step, d_in - start) * (d_in - start) for start in range(0, d_in, step))


def accumulate(d_in: int, tokens: float, *, split: bool = False) -> Work:
    """``hessian.accumulate``: widened inputs, weighted inputs, their product."""
    products = activation_sum(triangle_flops(d_in, tokens, split=split), width=d_in, split=split)
    return products + work(wide=2 * F32_BYTES * tokens * d_in)


def output_chunks(d_out: int) -> list[int]:
    """Rows of the chunks of ``outputs.empty_outputs``."""
    return [min(CHUNK_ROWS, d_out - start) for start in range(0, d_out, CHUNK_ROWS)]


def add_outputs(d_out: int, tokens: float, *, split: bool = False) -> Work:
    """``outputs.add_outputs``: widened and scaled gradients, their products."""
    chunks = output_chunks(d_out)
    flops = sum(triangle_flops(rows, tokens, split=True) if split else 2.0 * tokens * rows * rows for rows in chunks)
    return activation_sum(flops, width=max(chunks), split=split) + work(wide=3 * F32_BYTES * tokens * d_out)


def normalized(d_in: int) -> Work:
    """``hessian.normalized``: divided and mirrored."""
    return work(wide=3 * F32_BYTES * d_in * d_in)


def factorize(d_in: int) -> Work:
    """``factor.factorize``: permuted twice, factored, reversed, divided."""
    return work(factor=d_in**3 / 3, wide=5 * F32_BYTES * d_in * d_in)


def search_trials(choice: Choice, d_in: int, kind: Grid) -> int:
    """Weighted sums over all weights in ``scale_search._search_chunk``: one a scale tried, two a refit."""
    signs = 2 if kind is Grid.SIGNED and choice.bits <= 3 else 1
    tried = len(scale_search.divisors(choice.bits, group_width(choice, d_in), choice.scale_bits))
    return 1 + signs * tried + 2 * scale_search.refits(choice.bits, choice.scale_bits)


def quantize(
    d_out: int,
    d_in: int,
    choices: Sequence[Choice],
    *,
    kind: Grid,
    cpu: bool,
    parts: Sequence[int] | None = None,
    threads: int = 1,
    searched: bool = True,
) -> Work:
    """``gptq.gptq``, with the search for scales unless they are given: on uniform grids the column loop's products, its
    columns, the trials of the search; of every choice of trellis codes its own sweep.

    Args:
        d_out: rows, all together.
        d_in: inputs.
        choices: all that they are quantized at.
        kind: of uniform grids.
        cpu: whether a CPU computes.
        parts: rows of the layers that are stacked, for trellis codes; None: of one.
        threads: of a CPU's worker, for trellis codes.
        searched: whether scales are found.
    """
    uniform = [choice for choice in choices if not choice.trellis]
    found = [_on_grids(d_out, d_in, uniform, kind=kind, cpu=cpu, searched=searched)] if uniform else []
    for choice in choices:
        if choice.trellis:
            rows = [d_out] if parts is None else parts
            found += [trellis.trellis_scales(d_out, d_in)] if searched else []
            found.append(trellis.gptq_trellis(rows, d_in, choice.bits, cpu=cpu, threads=threads))
    return total(found)


def _on_grids(d_out: int, d_in: int, choices: Sequence[Choice], *, kind: Grid, cpu: bool, searched: bool) -> Work:
    trials = sum(search_trials(choice, d_in, kind) for choice in choices) if searched else 0
    stacked = d_out * len(choices)
    propagated = sum(
        2.0 * (last - middle) * (middle - first)
        for first, middle, last in column_loop.halvings(0, d_in, column_loop.COMPILED_LEAF["cpu" if cpu else "cuda"])
        if middle < last
    )
    chunks = -(-d_out // gptq.rows_at_once(d_in, len(choices), cpu=cpu))
    width = min(d_in // 4, stacked)
    updates = propagated * stacked
    return (
        (matmul(updates, dtype=FP32, width=width) if cpu else matmul(3 * updates, dtype=BF16, width=width))
        + Work(
            amounts={
                COUNTED: 0.0 if cpu else 2.0 * trials * d_out * d_in,  # compiled loops on CPUs, products elsewhere
                "search": float(trials * d_out * d_in),
                "columns": float(d_in * stacked),
                "column-steps": float(d_in * chunks),
            }
        )
        + work(wide=F32_BYTES * d_in * (d_out + stacked))
    )


def loss(d_out: int, d_in: int, *, cpu: bool) -> Work:
    """``gptq.loss``: each pair of column blocks once."""
    step = max(1, -(-d_in // gptq.LOSS_BLOCKS))
    flops = sum(2.0 * d_out * min(step, d_in - start) * (d_in - start) for start in range(0, d_in, step))
    return precise(flops, width=d_in, cpu=cpu) + work(wide=3 * F32_BYTES * d_out * d_in)


def dequantize(d_out: int, d_in: int, *, itemsize: int, choice: Choice | None = None) -> Work:
    """``QuantizedWeight.dequantize``: codes widened, then scaled; those of a choice with a trellis decoded."""
    if choice is not None and choice.trellis:
        return trellis.decoded(d_out, d_in, choice.bits)
    return work(wide=2 * itemsize * d_out * d_in)


def predicted_cost(d_out: int, d_in: int, num_choices: int, *, cpu: bool) -> Work:
    """``gptq.predicted_cost``."""
    return num_choices * (loss(d_out, d_in, cpu=cpu) + dequantize(d_out, d_in, itemsize=F32_BYTES))


def descend(d_out: int, d_in: int, *, sweeps: int, cpu: bool) -> Work:
    """``descent.descend`` while every row still moves: an upper bound."""
    flops = 2.0 * d_in * d_in
    limit = descent.CPU_ROWS if cpu else descent.GPU_ELEMENTS // d_in
    chunks = -(-d_out // max(1, limit))
    return sweeps * (
        precise(flops * d_out, width=min(descent.BLOCK_COLUMNS * 4, d_in) if cpu else d_in, cpu=cpu)
        + work(descent=d_in * d_out, descent_steps=d_in * chunks)
    )


def refit(d_out: int, d_in: int, choice: Choice, *, cpu: bool) -> Work:
    """``refit.refit``: the products of the systems, their factorisations, the elementwise sums over groups.

    A step is a group of a chunk of rows; where one launch does all groups, a chunk. Trellis codes have no kernels.
    """
    groups = choice.groups(d_in)
    width = d_in // groups
    pulls = 2.0 * d_in * d_in
    systems = sum(2.0 * width * (d_in - g * width) for g in range(groups))
    sums = 2.0 * d_in + sum(2.0 * (groups - g) * width for g in range(groups)) + 4.0 * groups * groups
    small = groups**3 // 3 + 2.0 * groups * groups
    elements = sum((groups - g) * width for g in range(groups))
    chunks = -(-d_out // refits.rows_at_once(d_in, groups, cpu=cpu))
    has_kernel = not cpu and not choice.trellis
    steps = 1 if has_kernel and refits.fills_a_gpu(d_in, groups) else groups
    if not has_kernel:
        products = matmul((pulls + systems) * d_out, dtype=FP32, width=width)
        products += trellis.decoded(d_out, d_in, choice.bits) if choice.trellis else NOTHING
    else:  # codes are bfloat16 numbers, so that a product with H has two halves
        products = precise(pulls * d_out, width=d_in, cpu=cpu) + matmul(2 * systems * d_out, dtype=BF16, width=d_in)
    return products + Work(
        amounts={
            COUNTED: (sums + small) * d_out,
            "refit": float((elements + groups**3 / 3) * d_out),
            "refit-steps": float(chunks * steps),
        }
    )


def polish(d_out: int, d_in: int, choice: Choice, *, rounds: int, sweeps: int, cpu: bool, threads: int = 1) -> Work:
    """``polish.polish`` for one choice, its guard included; of trellis codes a refit more, and one sweep a round."""
    refitted = refit(d_out, d_in, choice, cpu=cpu)
    if choice.trellis:
        one = trellis.descend_trellis(d_out, d_in, choice.bits, cpu=cpu, threads=threads) + refitted
        before = refitted
    else:
        one, before = descend(d_out, d_in, sweeps=sweeps, cpu=cpu) + refitted, NOTHING
    guard = loss(d_out, d_in, cpu=cpu) + dequantize(d_out, d_in, itemsize=F32_BYTES, choice=choice)
    return before + rounds * one + 2 * guard + work(wide=2 * F32_BYTES * d_in * d_in)


def target_error(d_out: int, d_in: int, *, cpu: bool) -> Work:
    """``correction.target_error``, the product W D being given."""
    return loss(d_out, d_in, cpu=cpu) + work(wide=4 * F32_BYTES * d_out * d_in)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refinement:
    """How layers are refined."""

    corrected: bool
    polish_rounds: int
    polish_sweeps: int
    row_blocks: int
    kind: Grid
    cpu: bool
    threads: int = 1
    """Of a CPU's worker."""


def quantize_refined(
    d_out: int, d_in: int, choice: Choice, how: Refinement, *, pulled: bool, parts: Sequence[int] | None = None
) -> Work:
    """``refine.quantize.quantize_refined`` of one layer from the merged sums of its site.

    Args:
        d_out: rows.
        d_in: inputs.
        choice: bits and group size.
        how: the layer is refined.
        pulled: whether what its outputs lack is given.
        parts: rows of each part that is rounded for itself; None: all together.
    """
    found = [normalized(d_in), factorize(d_in)]
    if how.corrected:
        solve = work(factor=2.0 * d_in * d_in * d_out)
        product = NOTHING if pulled else matmul(2.0 * d_out * d_in * d_in, dtype=FP32, width=d_in)  # W D, or P as it is
        found += [factorize(d_in), solve, product, work(wide=4 * F32_BYTES * d_in * d_in)]
    return total([*found, *(_part(rows, d_in, choice, how) for rows in ([d_out] if parts is None else parts))])


def _part(rows: int, d_in: int, choice: Choice, how: Refinement) -> Work:
    """Rows that are rounded together, plain and corrected, and what follows."""
    chunks, how = output_chunks(rows), replace(how, polish_rounds=rounds_of(choice, how.polish_rounds))
    in_blocks = any(blocks_of(own, how.row_blocks, together=_together(choice)) > 1 for own in chunks)
    first = replace(choice, trellis=False) if in_blocks else choice
    found = [_rounded_once_or_twice(rows, d_in, first, how)]
    if how.corrected:
        errors = 2 * target_error(rows, d_in, cpu=how.cpu)
        found += [errors, dequantize(2 * rows, d_in, itemsize=F32_BYTES, choice=first)]
    if in_blocks:
        found.append(_in_blocks(chunks, d_in, choice, how))
    elif how.polish_rounds:
        found.append(_polished(rows, d_in, choice, how, rounds=how.polish_rounds))
        found += [2 * target_error(rows, d_in, cpu=how.cpu)] if how.corrected else []
    return total(found)


def _together(choice: Choice) -> int:
    """Rows that no block cuts."""
    return SEGMENT_ROWS if choice.trellis else 1


def _rounded_once_or_twice(rows: int, d_in: int, choice: Choice, how: Refinement) -> Work:
    """Plain, and where there is a correction the corrected rows too: of trellis codes one after the other where they
    fill a GPU."""
    times = 2 if how.corrected else 1
    if choice.trellis and not how.cpu and rows * d_in >= ALONE_ELEMENTS:
        return times * _quantized([rows], d_in, choice, how)
    return _quantized([rows] * times, d_in, choice, how)


def _quantized(parts: Sequence[int], d_in: int, choice: Choice, how: Refinement) -> Work:
    return quantize(sum(parts), d_in, [choice], kind=how.kind, cpu=how.cpu, parts=parts, threads=how.threads)


def _polished(rows: int, d_in: int, choice: Choice, how: Refinement, *, rounds: int) -> Work:
    return polish(rows, d_in, choice, rounds=rounds, sweeps=how.polish_sweeps, cpu=how.cpu, threads=how.threads)


def _in_blocks(chunks: Sequence[int], d_in: int, choice: Choice, how: Refinement) -> Work:
    """``row_feedback.RowBlocks`` of chunks of so many rows, and ``joint_error`` of rows on their own, of what was
    rounded and of every polish."""
    parts: list[Work] = []
    at_once: dict[int, list[int]] = {}  # number of a block -> its rows in every chunk, which are rounded together
    together = _together(choice)
    blocks: list[list[int]] = []  # of every chunk
    for rows in chunks:
        blocks.append([])
        size = -(-rows // (blocks_of(rows, how.row_blocks, together=together) * together)) * together
        all_move = rows * d_in <= MOVED_AT_ONCE  # whenever they are improved, by one product
        joint = precise(2.0 * rows * d_in * (rows + d_in), width=min(rows, d_in), cpu=how.cpu)
        decoding = dequantize(rows, d_in, itemsize=F32_BYTES, choice=choice)
        parts += [factorize(rows), (1 + how.polish_rounds) * (joint + decoding)]
        # of rows on their own: uniform codes, and where those stand in for streams of what is not rounded
        uniform = dequantize(rows, d_in, itemsize=F32_BYTES, choice=replace(choice, trellis=False))
        parts += [joint + uniform, joint if choice.trellis else NOTHING]
        for block, start in enumerate(range(0, rows, size)):
            own = min(size, rows - start)
            at_once.setdefault(block, []).append(own)
            blocks[-1].append(own)
            moved = matmul(2.0 * start * own * d_in, dtype=FP32, width=own)
            parts += [moved, NOTHING if all_move else how.polish_rounds * moved]
            parts.append(work(factor=float(own * own * start)) if start else NOTHING)
        if all_move:
            parts.append(how.polish_rounds * matmul(2.0 * rows * rows * d_in, dtype=FP32, width=rows))
    if choice.trellis:
        parts.append(trellis.trellis_scales(sum(chunks), d_in))
        parts.append(trellis.round_stream_blocks(blocks, d_in, choice.bits, cpu=how.cpu, threads=how.threads))
    else:
        parts += [
            quantize(sum(rows), d_in, [choice], kind=how.kind, cpu=how.cpu, searched=False) for rows in at_once.values()
        ]
    if how.polish_rounds:
        for rows in chunks:
            step = whole_segments(IMPROVED_ELEMENTS // d_in)
            for start in range(0, rows, step):
                own = min(step, rows - start)
                parts.append(how.polish_rounds * _polished(own, d_in, choice, how, rounds=1))
    return total(parts)


def sample_labels(tokens: float, vocabulary: int, *, run: int) -> Work:
    """``head.sample_labels``: two running sums as products in float64."""
    runs = math.ceil(vocabulary / run)
    flops = 2.0 * tokens * (runs * runs + run * run)
    return Work(amounts={COUNTED: flops}) + work(wide=8 * tokens * (vocabulary + 4 * runs)) if tokens else NOTHING
