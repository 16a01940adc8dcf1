"""Which powers of two bring a model's weights to one magnitude (`exponents` says what becomes of them).

A block has two chains of the same form. A norm feeds layers i with columns 2^a; one of them, f, also makes the inputs
of a further layer l, whose columns take 2^b and whose values f's rows give up:

    attention   a of qkv, b of o:           q, k: 2^a W    f = v:  2^(a - b) W    l = o:    2^b W
    MLP         a of gate_up, b of down:    gate: 2^a W    f = up: 2^(a - b) W    l = down: 2^b W

With m = log2 of a layer's typical absmax of a group, and the target t, the distances are m_i + a - t, m_f + a - b - t
and m_l + b - t. Two unknowns do not make three of them zero. Where all layers have one m, a = 4 (t - m) / 3 and
b = 2 (t - m) / 3 leave each (t - m) / 3 away, the readers i above t, f and l below. Taken are the integers a and b of
the smallest largest distance; of equals, of the smallest sum of squares. The head has one unknown and one layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrpq.model.layers import LinearSpec
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.streaming import BlockStream
from lrpq.transform.exponents import Exponents, check_exact
from lrpq.transform.folded import FoldedSource
from lrpq.transform.folds import FoldPlan
from lrpq.transform.smoothing import Pair, smoothable_pairs

if TYPE_CHECKING:
    from jaxtyping import Float

TARGET = 4.0
"""log2 of the typical absmax of a group. Scales are absmax / 2^(bits - 1); those of 8 bits are normal numbers of
float8_e4m3fn from absmax 2^1 on, those of 2 bits are finite up to 2^9.8. In SmolLM2-135M a layer's largest group is up
to 2^4.4 times its typical one, its smallest 1% down to 2^-1 (the attention's: 2^-2.9): the middle is 4."""
NUM_ROWS = 16
"""Rows of a layer that are looked at: in SmolLM2-135M their median group is within 2^.1 of that of all rows."""
GROUP = 64
"""Columns of a group."""


def choose_exponents(source: ModelSource, rotation: FoldPlan | None = None) -> Exponents:
    """Powers of two with which groups' scales in float8_e4m3fn are normal numbers, as far as they can be.

    Reads ``NUM_ROWS`` rows of every layer, evenly spaced.

    Args:
        source: the original.
        rotation: what becomes of it before its sites are scaled. Of its folds those that change every row by itself
            are applied to the rows; rotations of rows among each other, which keep their mean square, are left out.

    Raises:
        ModelError: the architecture is not supported, or the scaling would round; it says why.
    """
    check_exact(source)
    plan = FoldPlan(tensors={}) if rotation is None else rotation
    stream = BlockStream(FoldedSource(source, plan), dtype=torch.float32)
    blocks = []
    for block in range(stream.num_blocks):
        pairs, _ = smoothable_pairs(stream, block)
        feeds = {pair.feed: pair for pair in pairs if not pair.is_norm}
        of_block: dict[str, int] = {}
        for pair in (pair for pair in pairs if pair.is_norm):
            of_block |= _chain(source, plan, pair, feeds)
        blocks.append(of_block)
    head = stream.head_spec
    found = None if head is None else _log_absmax(_rows(source, plan, head, 0, head.d_out))
    return Exponents(blocks=tuple(blocks), head=0 if found is None else round(TARGET - found))


def best_pair(readers: Sequence[float], feed: float | None, last: float | None) -> tuple[int, int]:
    """The exponents a and b of a chain.

    Args:
        readers: m of the layers that read the norm and feed nothing.
        feed: m of the layer that does; None where it has no weights but zeros.
        last: m of what that layer feeds; None likewise.
    """

    def distances(a: int, b: int) -> list[float]:
        known = [m + a for m in readers]
        known += [] if feed is None else [feed + a - b]
        known += [] if last is None else [last + b]
        return [abs(m - TARGET) for m in known]

    def badness(ab: tuple[int, int]) -> tuple[float, float, int]:
        found = distances(*ab)
        return max(found, default=0.0), sum(d * d for d in found), abs(ab[0]) + abs(ab[1])

    reach = 2 * math.ceil(max((abs(TARGET - m) for m in (*readers, feed, last) if m is not None), default=0.0))
    pairs = [(a, b) for a in range(-reach, reach + 1) for b in _around(_balanced(a, feed, last))]
    return min(pairs, key=badness)


def _balanced(a: int, feed: float | None, last: float | None) -> float:
    """The b that is best for a given a, were it no integer: of both ways of judging."""
    if feed is not None and last is not None:
        return (a + feed - last) / 2
    if feed is not None:
        return a + feed - TARGET
    return 0.0 if last is None else TARGET - last


def _around(b: float) -> tuple[int, int]:
    return math.floor(b), math.ceil(b)


def _chain(source: ModelSource, plan: FoldPlan, pair: Pair, feeds: Mapping[str, Pair]) -> dict[str, int]:
    """Exponents of a site behind a norm, and of the site that one of its layers feeds."""
    readers: list[float | None] = []
    feed = last = None
    fed: Pair | None = None
    for layer in pair.layers:
        num_others = layer.d_out
        if layer.name in feeds:
            fed = feeds[layer.name]
            num_others -= fed.num_factors  # 0 but for fused layers
            feed = _log_absmax(_rows(source, plan, layer, num_others, layer.d_out))
            (reader,) = fed.layers
            last = _log_absmax(_rows(source, plan, reader, 0, reader.d_out))
        if num_others:
            readers.append(_log_absmax(_rows(source, plan, layer, 0, num_others)))
    a, b = best_pair([m for m in readers if m is not None], feed, last)
    return {pair.site: a} if fed is None else {pair.site: a, fed.site: b}


def _rows(source: ModelSource, plan: FoldPlan, layer: LinearSpec, start: int, stop: int) -> Float[Tensor, "rows d_in"]:
    """Rows of a layer from ``start`` to ``stop``, evenly spaced, float64."""
    (name,) = layer.stored
    number = min(NUM_ROWS, stop - start)
    made = plan.tensors.get(name)
    chosen = [start + (2 * i + 1) * (stop - start) // (2 * number) for i in range(number)]
    rows = source.read_some(name if made is None else made.origin, chosen).double()
    for fold in () if made is None else made.folds:
        rows = fold(rows) if fold.rowwise else rows
    return rows


def _log_absmax(rows: Float[Tensor, "rows d_in"]) -> float | None:
    """log2 of the median group's absmax, of groups that are not all zero; None where all are."""
    width = min(GROUP, rows.shape[1])
    whole = rows[:, : rows.shape[1] // width * width].abs().reshape(-1, width).amax(1)
    found = whole[whole > 0]
    return math.log2(float(found.median())) if len(found) else None
