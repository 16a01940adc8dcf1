"""Grids of all activations of a classifier, from one forward walk over calibration images.

    site or point                   full recipe
    qkv, up: LayerNorm's outputs    uniform a channel, folded into one for the tensor (folding)
    o: attention's output           uniform
    down: the activation's output   uniform, shifted where that is better
    query, key, value               uniform
    pattern: softmax's output       logarithmic, or uniform where that is better

Ranges are clipped as far as the error of the next product asks for (clipping, judging).
What the head and the patch embedding read stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Flag, auto
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lrpq.activations.attention import KEY, PATTERN, POINTS, QUERY, VALUE, with_points
from lrpq.activations.clipping import (
    SHARES,
    UNCLIPPED,
    Error,
    best,
    channel_candidates,
    pattern_candidates,
    squared_error,
    tensor_candidates,
)
from lrpq.activations.folding import NORMS, Folding, folding_of
from lrpq.activations.grids import ActivationGrid
from lrpq.activations.judging import AttentionError, site_error
from lrpq.errors import ModelError
from lrpq.model.streaming import BlockStream

if TYPE_CHECKING:
    from jaxtyping import Float

AFTER_ATTENTION, AFTER_ACTIVATION = "o", "down"
BlockGrids = Mapping[str, ActivationGrid]
"""Input site, or point of attention -> its grid."""


class Means(Flag):
    """Ways to spend few codes well; without any, all grids are uniform, a tensor each, over the whole range."""

    NONE = 0
    CHANNELS = auto()
    """A grid a channel behind LayerNorm."""
    CLIPPED = auto()
    """Ranges by error search."""
    JUDGED_BY_OUTPUT = auto()
    """Grids are chosen by the error of the next product instead of the activation's own."""
    LOGARITHMIC = auto()
    """Candidates for softmax's outputs."""
    SHIFTED = auto()
    """Candidates for the activation function's outputs."""
    ALL = CHANNELS | CLIPPED | JUDGED_BY_OUTPUT | LOGARITHMIC | SHIFTED


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What a walk gives."""

    grids: tuple[BlockGrids, ...]
    """By block, for the folded model: all of them one a tensor."""
    foldings: Mapping[tuple[int, str], Folding]
    """(block, site) -> what has to be folded first; empty without `Means.CHANNELS`."""


def calibrate(
    stream: BlockStream,
    images: Float[Tensor, "n channels height width"],
    *,
    bits: Callable[[int, str], int],
    means: Means = Means.ALL,
    token_weights: Mapping[int, Mapping[str, Tensor]] | None = None,
    micro_batch: int = 32,
) -> Calibration:
    """Walk the blocks once; activations are those of the model in full precision.

    Memory: one block's activations for all images, float32; the pattern has heads x t^2 values an image.

    Args:
        stream: the model.
        images: to calibrate on, preprocessed.
        bits: (block, site or point) -> width of its codes.
        means: which grids.
        token_weights: block -> site -> what each token counts when grids are judged by output; ones by default.
        micro_batch: images computed at once.

    Raises:
        ModelError: no table says which norms make the sites.
        QuantizationError: a width that no grid has, or activations that are not finite.
    """
    if stream.architecture not in NORMS:
        raise ModelError(f"{stream.architecture}: its activations cannot be quantized; supported: {list(NORMS)}")
    norms = NORMS[stream.architecture] if Means.CHANNELS in means else {}
    shares = SHARES if Means.CLIPPED in means else UNCLIPPED
    with stream.embedding():
        hidden = [stream.embed(batch) for batch in images.split(micro_batch)]
    found: list[BlockGrids] = []
    foldings: dict[tuple[int, str], Folding] = {}
    for index, block in stream.stream(range(stream.num_blocks)):
        with torch.no_grad(), recorded(stream, index, block) as seen:
            hidden = [stream.run(block, index, batch) for batch in hidden]
        grids: dict[str, ActivationGrid] = {}
        activations = {place: torch.cat(parts).float() for place, parts in seen.items()}
        errors = _errors(stream, index, block, activations, means, (token_weights or {}).get(index, {}))
        for place, x in activations.items():
            width, error = bits(index, place), errors[place]
            if place in norms:
                channels = best(channel_candidates(x, width, shares=shares), error)
                foldings[index, place] = folding_of(channels)
                grids[place] = foldings[index, place].grid
            elif place == PATTERN and Means.LOGARITHMIC in means:
                grids[place] = best(pattern_candidates(x, width, shares=shares), error)
            else:
                shifted = place == AFTER_ACTIVATION and Means.SHIFTED in means
                low = float(x.amin()) if shifted else None
                grids[place] = best(tensor_candidates(x, width, shares=shares, low=low), error)
        found.append(grids)
    return Calibration(grids=tuple(found), foldings=foldings)


def _errors(
    stream: BlockStream,
    index: int,
    block: nn.Module,
    activations: Mapping[str, Tensor],
    means: Means,
    weights: Mapping[str, Tensor],
) -> dict[str, Error]:
    """What the grids of every site and point are judged by."""
    if Means.JUDGED_BY_OUTPUT not in means:
        return {place: squared_error(x) for place, x in activations.items()}
    found: dict[str, Error] = {}
    rows: dict[str, Tensor] = {}
    for site, members in stream.sites(index).items():
        layers = [block.get_submodule(stream.local_name(spec)) for spec in members]
        rows[site] = torch.cat([layer.get_parameter("weight").float() for layer in layers])
        found[site] = site_error(activations[site], rows[site], weights.get(site))
    scaling = getattr(attention_of(stream, block), "scaling", activations[QUERY].shape[-1] ** -0.5)
    query, key, value, pattern = (activations[point] for point in (QUERY, KEY, VALUE, PATTERN))
    W, s = rows[AFTER_ATTENTION], weights.get(AFTER_ATTENTION)
    attention = AttentionError(query, key, value, pattern, scaling=float(scaling), W=W, s=s)
    return found | {point: attention.of(point) for point in POINTS}


@contextmanager
def recorded(stream: BlockStream, index: int, block: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Inside, every forward of a block adds what its sites [tokens, d_in] and points of attention [n, ..] hold."""
    seen: dict[str, list[Tensor]] = {}

    def note(place: str, x: Tensor) -> Tensor:
        seen.setdefault(place, []).append(x.detach())
        return x

    def site_hook(site: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, arguments: (note(site, arguments[0].flatten(0, -2)), None)[1]

    handles = [
        block.get_submodule(stream.local_name(members[0])).register_forward_pre_hook(site_hook(site))
        for site, members in stream.sites(index).items()
    ]
    points = {point: (lambda x, point=point: note(point, x)) for point in POINTS}
    try:
        with with_points(attention_of(stream, block), points):
            yield seen
    finally:
        for handle in handles:
            handle.remove()


def attention_of(stream: BlockStream, block: nn.Module) -> nn.Module:
    """The attention module of a block."""
    (unit,) = [unit for unit in stream.family.units if unit.returns_tuple]
    return block.get_submodule(unit.path)
