"""Grids of all activations of a classifier, from one forward walk over calibration images.

    site or point                   full recipe
    qkv, up: LayerNorm's outputs    uniform a channel, clipped; folded into one for the tensor (folding)
    o: attention's output           uniform, clipped
    down: the activation's output   uniform, shifted where that is better, clipped
    query, key, value               uniform, clipped
    pattern: softmax's output       logarithmic, or uniform where that is better

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

from lrpq.activations.attention import PATTERN, POINTS, with_points
from lrpq.activations.clipping import SHARES, UNCLIPPED, search_channels, search_pattern, search_tensor
from lrpq.activations.folding import NORMS, Folding, folding_of
from lrpq.activations.grids import ActivationGrid
from lrpq.errors import ModelError
from lrpq.model.streaming import BlockStream

if TYPE_CHECKING:
    from jaxtyping import Float

AFTER_ACTIVATION = "down"
BlockGrids = Mapping[str, ActivationGrid]
"""Input site, or point of attention -> its grid."""


class Means(Flag):
    """Ways to spend few codes well; without any, all grids are uniform, a tensor each, over the whole range."""

    NONE = 0
    CHANNELS = auto()
    """A grid a channel behind LayerNorm."""
    CLIPPED = auto()
    """Ranges by error search."""
    LOGARITHMIC = auto()
    """Candidates for softmax's outputs."""
    SHIFTED = auto()
    """Candidates for the activation function's outputs."""
    ALL = CHANNELS | CLIPPED | LOGARITHMIC | SHIFTED


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
    micro_batch: int = 32,
) -> Calibration:
    """Walk the blocks once; activations are those of the model in full precision.

    Memory: one block's activations for all images, float32; the pattern has heads x t^2 values an image.

    Args:
        stream: the model.
        images: to calibrate on, preprocessed.
        bits: (block, site or point) -> width of its codes.
        means: which grids.
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
        for place, parts in seen.items():
            x, width = torch.cat(parts).float(), bits(index, place)
            if place in norms:
                foldings[index, place] = folding_of(search_channels(x, width, shares=shares))
                grids[place] = foldings[index, place].grid
            elif place == PATTERN and Means.LOGARITHMIC in means:
                grids[place] = search_pattern(x, width, shares=shares)
            else:
                shifted = place == AFTER_ACTIVATION and Means.SHIFTED in means
                grids[place] = search_tensor(x, width, shares=shares, low=float(x.amin()) if shifted else None)
        found.append(grids)
    return Calibration(grids=tuple(found), foldings=foldings)


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
