"""Work of the quantizer's functions from shapes, with the constants and the cuts of those functions themselves.

Every function here is named after the one whose work it counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lrpq.model.layers import Choice
from lrpq.plan.work import COUNTED, NOTHING, Work, matmul, total, work
from lrpq.quant import column_loop, descent, gptq, halves, hessian, scale_search
from lrpq.quant import refit as refits
from lrpq.quant.grid import Grid, group_width
from lrpq.quant.row_feedback import IMPROVED_ELEMENTS, blocks_of
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


def quantize(d_out: int, d_in: int, choices: Sequence[Choice], *, kind: Grid, cpu: bool) -> Work:
    """``gptq.gptq`` with the search for scales: the column loop's products, its columns, the trials of the search."""
    trials = sum(search_trials(choice, d_in, kind) for choice in choices)
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


def dequantize(d_out: int, d_in: int, *, itemsize: int) -> Work:
    """``QuantizedWeight.dequantize``: codes widened, then scaled."""
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

    A step is a group of a chunk of rows; where one launch does all groups, a chunk.
    """
    groups = choice.groups(d_in)
    width = d_in // groups
    pulls = 2.0 * d_in * d_in
    systems = sum(2.0 * width * (d_in - g * width) for g in range(groups))
    sums = 2.0 * d_in + sum(2.0 * (groups - g) * width for g in range(groups)) + 4.0 * groups * groups
    small = groups**3 // 3 + 2.0 * groups * groups
    elements = sum((groups - g) * width for g in range(groups))
    chunks = -(-d_out // refits.rows_at_once(d_in, groups, cpu=cpu))
    steps = 1 if not cpu and refits.fills_a_gpu(d_in, groups) else groups
    if cpu:
        products = matmul((pulls + systems) * d_out, dtype=FP32, width=width)
    else:  # codes are bfloat16 numbers, so that a product with H has two halves
        products = precise(pulls * d_out, width=d_in, cpu=cpu) + matmul(2 * systems * d_out, dtype=BF16, width=d_in)
    return products + Work(
        amounts={
            COUNTED: (sums + small) * d_out,
            "refit": float((elements + groups**3 / 3) * d_out),
            "refit-steps": float(chunks * steps),
        }
    )


def polish(d_out: int, d_in: int, choice: Choice, *, rounds: int, sweeps: int, cpu: bool) -> Work:
    """``polish.polish`` for one choice, its guard included."""
    one = descend(d_out, d_in, sweeps=sweeps, cpu=cpu) + refit(d_out, d_in, choice, cpu=cpu)
    guard = loss(d_out, d_in, cpu=cpu) + dequantize(d_out, d_in, itemsize=F32_BYTES)
    return rounds * one + 2 * guard + work(wide=2 * F32_BYTES * d_in * d_in)


def target_error(d_out: int, d_in: int, *, cpu: bool) -> Work:
    """``correction.target_error``, the product W D being given."""
    return loss(d_out, d_in, cpu=cpu) + work(wide=4 * F32_BYTES * d_out * d_in)


def quantize_refined(
    d_out: int,
    d_in: int,
    choice: Choice,
    *,
    corrected: bool,
    pulled: bool,
    polish_rounds: int,
    polish_sweeps: int,
    row_blocks: int,
    kind: Grid,
    cpu: bool,
) -> Work:
    """``refine.quantize.quantize_refined`` of one layer from the merged sums of its site."""
    parts = [normalized(d_in), factorize(d_in)]
    if corrected:
        solve = work(factor=2.0 * d_in * d_in * d_out)
        product = NOTHING if pulled else matmul(2.0 * d_out * d_in * d_in, dtype=FP32, width=d_in)  # W D, or P as it is
        parts += [factorize(d_in), solve, product, work(wide=4 * F32_BYTES * d_in * d_in)]
        parts += [quantize(2 * d_out, d_in, [choice], kind=kind, cpu=cpu)]
        parts += [2 * target_error(d_out, d_in, cpu=cpu), dequantize(2 * d_out, d_in, itemsize=F32_BYTES)]
    else:
        parts.append(quantize(d_out, d_in, [choice], kind=kind, cpu=cpu))
    chunks = output_chunks(d_out)
    if any(blocks_of(rows, row_blocks) > 1 for rows in chunks):
        how = {"polish_rounds": polish_rounds, "polish_sweeps": polish_sweeps}
        parts.append(_in_blocks(chunks, d_in, choice, row_blocks, kind=kind, cpu=cpu, **how))
    elif polish_rounds:
        parts.append(polish(d_out, d_in, choice, rounds=polish_rounds, sweeps=polish_sweeps, cpu=cpu))
        parts += [2 * target_error(d_out, d_in, cpu=cpu)] if corrected else []
    return total(parts)


def _in_blocks(
    chunks: Sequence[int],
    d_in: int,
    choice: Choice,
    row_blocks: int,
    *,
    polish_rounds: int,
    polish_sweeps: int,
    kind: Grid,
    cpu: bool,
) -> Work:
    """``row_feedback.RowBlocks`` of chunks of so many rows, and ``joint_error`` of rows on their own, of what was
    rounded and of every polish."""
    parts: list[Work] = []
    at_once: dict[int, int] = {}  # number of a block -> its rows in all chunks, which are rounded together
    for rows in chunks:
        size = -(-rows // blocks_of(rows, row_blocks))
        joint = precise(2.0 * rows * d_in * (rows + d_in), width=min(rows, d_in), cpu=cpu)
        errors = (2 + polish_rounds) * (joint + dequantize(rows, d_in, itemsize=F32_BYTES))
        parts += [factorize(rows), errors]
        for block, start in enumerate(range(0, rows, size)):
            own = min(size, rows - start)
            at_once[block] = at_once.get(block, 0) + own
            # once to round, and once for each time that all rows are improved
            parts.append((1 + polish_rounds) * matmul(2.0 * start * own * d_in, dtype=FP32, width=own))
            parts.append(work(factor=float(own * own * start)) if start else NOTHING)
    parts += [quantize(rows, d_in, [choice], kind=kind, cpu=cpu) for rows in at_once.values()]
    if polish_rounds:
        for rows in chunks:
            step = max(1, IMPROVED_ELEMENTS // d_in)
            for start in range(0, rows, step):
                own = min(step, rows - start)
                parts.append(polish_rounds * polish(own, d_in, choice, rounds=1, sweeps=polish_sweeps, cpu=cpu))
    return total(parts)


def sample_labels(tokens: float, vocabulary: int, *, run: int) -> Work:
    """``head.sample_labels``: two running sums as products in float64."""
    runs = math.ceil(vocabulary / run)
    flops = 2.0 * tokens * (runs * runs + run * run)
    return Work(amounts={COUNTED: flops}) + work(wide=8 * tokens * (vocabulary + 4 * runs)) if tokens else NOTHING
