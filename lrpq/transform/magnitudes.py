"""Which powers of two bring a model's weights to one magnitude (`exponents` says what becomes of them).

With m = log2 of a layer's typical absmax of a group, and the target t, the distance of a layer is

    m + k - t      behind a norm, with one k a site (q, k, v; gate, up) or the head's
    m + r - t      where it writes the residual stream (o, down), with one r for all
    m + k + r - t  q and k with norms of their own

Taken are the integers of the smallest sum of squares, in which q and k with norms of their own count as much as v:
given r, every k is a rounded mean; r is searched. Without such q and k, distances are what layers that share an
exponent differ by. With them three conditions of the attention meet two unknowns: where t - m is the same for all
layers, q and k end 2/5 of it above t, v 2/5 and o 1/5 below.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrpq.model.layers import LinearSpec
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.streaming import BlockStream
from lrpq.transform.exponents import Exponents, check_exact
from lrpq.transform.folded import FoldedSource
from lrpq.transform.folds import FoldPlan
from lrpq.transform.graph import Graph
from lrpq.transform.parts import site_layers

if TYPE_CHECKING:
    from jaxtyping import Float

TARGET = 4.0
"""log2 of the typical absmax of a group. Scales are absmax / 2^(bits - 1); those of 8 bits are normal numbers of
float8_e4m3fn from absmax 2^1 on, those of 2 bits are finite up to 2^9.8. In SmolLM2-135M a layer's largest group is up
to 2^4.4 times its typical one, its smallest 1% down to 2^-1 (in attention 2^-2.9): the middle is 4."""
NUM_ROWS = 16
"""Rows of a tensor that are looked at: in SmolLM2-135M their median group is within 2^.1 of that of all rows."""
NUM_LAYERS = 16
"""Layers of a site that are looked at: all but for experts."""
GROUP = 64
"""Columns of a group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteMagnitudes:
    """m of the layers that share an exponent k."""

    plain: tuple[float, ...]
    normed: tuple[float, ...] = ()
    """Of layers that take r besides."""

    def best(self, r: int) -> tuple[int, float]:
        """k, and what is left of squares, the mean of either kind; 0 and 0 where all layers are zeros."""
        kinds = [[TARGET - m for m in self.plain], [TARGET - m - r for m in self.normed]]
        missing = [kind for kind in kinds if kind]
        k = round(fmean(map(fmean, missing))) if missing else 0
        return k, sum(fmean((k - each) ** 2 for each in kind) for kind in missing)


def choose_exponents(source: ModelSource, rotation: FoldPlan | None = None) -> Exponents:
    """Powers of two with which groups' scales in float8_e4m3fn are normal numbers.

    Reads ``NUM_ROWS`` rows of a layer, evenly spaced.

    Args:
        source: the original.
        rotation: what becomes of it before it is scaled. Of its folds those that change every row by itself are applied
            to the rows; rotations of rows among each other, which keep their mean square, are left out.

    Raises:
        ModelError: the architecture is not supported, or the scaling would round; it says why.
    """
    graph = check_exact(source)
    plan = FoldPlan(tensors={}) if rotation is None else rotation
    stream = BlockStream(FoldedSource(source, plan), dtype=torch.float32)
    blocks: list[dict[str, SiteMagnitudes]] = []
    writing: list[float] = []
    for block in range(stream.num_blocks):
        blocks.append(_behind_norms(source, plan, stream, graph, block))
        for site in graph.writes:
            writing += _magnitudes(source, plan, site_layers(stream, block, site))
    r = best_residual([site for of_block in blocks for site in of_block.values()], writing)
    head = [] if stream.head_spec is None else _magnitudes(source, plan, [stream.head_spec])
    return Exponents(
        blocks=tuple({name: site.best(r)[0] for name, site in of_block.items()} for of_block in blocks),
        residual=r,
        head=SiteMagnitudes(plain=tuple(head)).best(r)[0],
    )


def best_residual(sites: Sequence[SiteMagnitudes], writing: Sequence[float]) -> int:
    """The residual stream's exponent; of equals the one nearest to 0.

    Args:
        sites: behind norms.
        writing: m of the layers that write the stream.
    """

    def badness(r: int) -> tuple[float, int]:
        return sum((m + r - TARGET) ** 2 for m in writing) + sum(site.best(r)[1] for site in sites), abs(r)

    every = [*writing, *(m for site in sites for m in (*site.plain, *site.normed))]
    reach = 2 * math.ceil(max((abs(TARGET - m) for m in every), default=0.0))  # r may be the difference of two
    return min(range(-reach, reach + 1), key=badness)


def _behind_norms(
    source: ModelSource, plan: FoldPlan, stream: BlockStream, graph: Graph, block: int
) -> dict[str, SiteMagnitudes]:
    normed = {f"{stream.family.blocks}.{block}.{path}" for path in graph.normed}
    found = {}
    for feed in graph.norms:
        layers = site_layers(stream, block, feed.site)
        found[feed.site] = SiteMagnitudes(
            plain=tuple(_magnitudes(source, plan, [layer for layer in layers if layer.name not in normed])),
            normed=tuple(_magnitudes(source, plan, [layer for layer in layers if layer.name in normed])),
        )
    return found


def _magnitudes(source: ModelSource, plan: FoldPlan, layers: Sequence[LinearSpec]) -> Iterator[float]:
    """m of the tensors of some layers, those of zeros left out."""
    for layer in (layers[i] for i in _spaced(len(layers), NUM_LAYERS)):
        for name in layer.stored:
            absmax = _groups(_rows(source, plan, name))
            if len(absmax):
                yield math.log2(float(absmax.median()))


def _rows(source: ModelSource, plan: FoldPlan, name: str) -> Float[Tensor, "rows d_in"]:
    """Evenly spaced rows of a tensor, float64."""
    made = plan.tensors.get(name)
    origin, folds = (name, ()) if made is None else (made.origin, made.folds)
    rows = source.read_some(origin, _spaced(source.shape(origin)[0], NUM_ROWS)).double()
    for fold in folds:
        rows = fold(rows) if fold.rowwise else rows
    return rows


def _groups(rows: Float[Tensor, "rows d_in"]) -> Float[Tensor, "*groups"]:
    """Absmax of the groups that are not all zero."""
    width = min(GROUP, rows.shape[1])
    absmax = rows[:, : rows.shape[1] // width * width].abs().reshape(-1, width).amax(1)
    return absmax[absmax > 0]


def _spaced(number: int, wanted: int) -> list[int]:
    """``wanted`` of ``number`` things, evenly spaced; all of them if there are no more."""
    taken = min(number, wanted)
    return [(2 * i + 1) * number // (2 * taken) for i in range(taken)]
