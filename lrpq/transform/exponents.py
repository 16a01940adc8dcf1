"""Sites scaled by powers of two: the same function, bit for bit, with weights of another magnitude.

For a site's inputs x and an integer k, W x = (2^k W) (2^-k x). The division moves into what makes x: the gain of a norm
(of the head: of the last one), the values' rows, the up projection's rows. A power of two changes no digit of a
floating-point number, so sums and products keep theirs, in whatever order they are made. What it does change is the
range: scales of groups that are stored in few bits of exponent fit. How k is chosen is `magnitudes`.

Exact as long as nothing falls below the smallest normal number of its type: float32 and bfloat16 are far from that,
float16 is not, for gains of about 1 are divided by up to 2^20.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lrpq.errors import ModelError
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.streaming import BlockStream
from lrpq.transform.folded import FoldedSource
from lrpq.transform.folds import FoldList, FoldPlan, PowerOfTwo, ScaleLastRows
from lrpq.transform.graph import exactly_scalable_graph
from lrpq.transform.parts import stored_biases
from lrpq.transform.smoothing import Pair, smoothable_pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class Exponents:
    """Powers of two of a model: the columns of what reads a site are multiplied by 2^k."""

    blocks: tuple[Mapping[str, int], ...]
    """Input site -> k, one mapping a block; sites that are not named keep what they have."""
    head: int = 0
    """k of the head; 0 where it is tied to the embedding."""


class ScaledSource(FoldedSource):
    """A model whose sites are scaled, without a copy of it (`folded`).

    Args:
        source: the original, or a rotated one.
        exponents: of its sites.

    Raises:
        ModelError: the exponents are of another model, or the scaling would round.
    """

    changed_by: ClassVar[str] = "scaled by powers of two"
    instead: ClassVar[str] = "compress the model with scales of 16 bits"

    def __init__(self, source: ModelSource, exponents: Exponents) -> None:
        super().__init__(source, exponents_plan(source, exponents))


class StoredScaledSource(ScaledSource):
    """The same as it is when it is loaded from a checkpoint: what computes has the stored dtype's values."""

    def read_rows(self, names: Sequence[str]) -> Tensor:
        """Read tensors whose rows make one, each rounded once to its stored dtype."""
        return ModelSource.read_rows(self, names)


def check_exact(source: ModelSource) -> None:
    """Refuse a model in which a power of two would change digits.

    Raises:
        ModelError: what stands against it.
    """
    exactly_scalable_graph(source)
    for name in source.names():
        if source.dtype(name) is torch.float16:
            raise ModelError(
                f"tensor {name} of {source.folder}: is stored in float16, whose range is too small for gains and "
                "weights scaled by powers of two; give the model in bfloat16, or compress it with scales of 16 bits"
            )


def exponents_plan(source: ModelSource, exponents: Exponents) -> FoldPlan:
    """What every tensor becomes; reads no weights.

    Raises:
        ModelError: the exponents are of another model, or the scaling would round.
    """
    check_exact(source)
    stream = BlockStream(source, dtype=torch.float32)
    if len(exponents.blocks) != stream.num_blocks or (exponents.head and stream.tied_head):
        raise ModelError(
            f"model {source.folder}: has {stream.num_blocks} blocks, and a head that is "
            f"{'' if stream.tied_head else 'not '}tied; the powers of two are those of another model, with "
            f"{len(exponents.blocks)} blocks; give the model that the checkpoint was made from"
        )
    folds, skipped = FoldList(), []
    for block, of_block in enumerate(exponents.blocks):
        pairs, left_out = smoothable_pairs(stream, block)
        skipped += left_out
        by_site = {pair.site: pair for pair in pairs}
        for site, k in of_block.items():
            if site not in by_site:
                raise ModelError(
                    f"model {source.folder}: block {block} has no site {site} that can be scaled; the powers of two "
                    "are those of another model; give the model that the checkpoint was made from"
                )
            _scale_pair(stream, by_site[site], k, folds)
    if exponents.head and (head := stream.head_spec) is not None:
        folds.add(stream.stored(f"{stream.family.tail[0]}.weight"), PowerOfTwo(exponent=-exponents.head))
        folds.add(head.stored, PowerOfTwo(exponent=exponents.head))
    return FoldPlan(tensors=folds.tensors(), skipped=tuple(skipped))


def _scale_pair(stream: BlockStream, pair: Pair, k: int, folds: FoldList) -> None:
    made = [*stream.stored(f"{pair.feed}.weight"), *([] if pair.is_norm else stored_biases(stream, pair.feed))]
    if pair.num_factors == stream.source.shape(made[0])[0]:
        folds.add(made, PowerOfTwo(exponent=-k))
    else:  # fused with layers that other things are made from
        folds.add(made, ScaleLastRows(factor=torch.full((pair.num_factors,), 2.0**-k, dtype=torch.float64)))
    for layer in pair.layers:
        folds.add(layer.stored, PowerOfTwo(exponent=k))
