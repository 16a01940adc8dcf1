"""Grids of all activations of a classifier, from one forward walk over calibration images.

    site or point                   full recipe
    qkv, up, merge: LayerNorm's     uniform a channel, folded into one for the tensor (folding)
    o: attention's output           uniform
    down: the activation's output   uniform, shifted where that is better
    query, key, value               uniform
    pattern: softmax's output       logarithmic, or uniform where that is better

Ranges are clipped as far as the error of the next product asks for (clipping, judging).
What the head and the patch embedding read stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Flag, auto
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lrpq.activations.attention import KEY, MASK, PATTERN, POINTS, QUERY, VALUE, with_points
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
from lrpq.activations.grids import ActivationGrid, UniformGrid
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
class Candidate:
    """The best grid of one width at one place."""

    grid: ActivationGrid
    """One for the tensor, of the folded model."""
    folding: Folding | None
    """What has to be folded first."""
    cost: float
    """Nats a token, where grids are judged by output with token weights; otherwise the error it was chosen by."""

    @property
    def original_grid(self) -> ActivationGrid:
        """The grid for the model before anything is folded: one a channel where something is."""
        return self.grid if self.folding is None else self.folding.channels


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A site or point of a block."""

    num_values: int
    """Activations an image."""
    row: int
    """Those of a row: inputs of a layer, entries of a head's vector, or tokens that a row of the pattern has."""
    candidates: Mapping[int, Candidate]
    """By width."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What a walk gives: places by block and name."""

    places: Mapping[tuple[int, str], Place]

    def grids(self, widths: Mapping[tuple[int, str], int]) -> tuple[BlockGrids, ...]:
        """Grids by block, for the folded model."""
        found: list[dict[str, ActivationGrid]] = [{} for _ in range(1 + max(block for block, _ in self.places))]
        for (block, name), place in self.places.items():
            found[block][name] = place.candidates[widths[block, name]].grid
        return tuple(found)

    def foldings(self, widths: Mapping[tuple[int, str], int]) -> dict[tuple[int, str], Folding]:
        """(block, site) -> what has to be folded first; empty without `Means.CHANNELS`."""
        found = {key: place.candidates[widths[key]].folding for key, place in self.places.items()}
        return {key: folding for key, folding in found.items() if folding is not None}

    def grids_on_folded(
        self, widths: Mapping[tuple[int, str], int]
    ) -> dict[tuple[int, str], dict[int, ActivationGrid]]:
        """(block, site or point) -> width -> its grid as the model has it that is folded for ``widths``; its codes are
        those of the original's grid."""
        found: dict[tuple[int, str], dict[int, ActivationGrid]] = {}
        for key, place in self.places.items():
            folding = place.candidates[widths[key]].folding
            for width, candidate in place.candidates.items():
                grid = candidate.original_grid
                if folding is not None and isinstance(grid, UniformGrid):
                    grid = folding.of_grid(grid)
                found.setdefault(key, {})[width] = grid
        return found

    def uniform(self, bits: int) -> dict[tuple[int, str], int]:
        """The same width everywhere."""
        return dict.fromkeys(self.places, bits)


def _nothing(_: int, __: Mapping[tuple[int, str], Place]) -> None:
    pass


def calibrate(
    stream: BlockStream,
    images: Float[Tensor, "n channels height width"],
    *,
    widths: Sequence[int],
    means: Means = Means.ALL,
    token_weights: Mapping[int, Mapping[str, Tensor]] | None = None,
    micro_batch: int = 32,
    blocks: Collection[int] | None = None,
    on_block: Callable[[int, Mapping[tuple[int, str], Place]], None] = _nothing,
) -> Calibration:
    """Walk the blocks once; activations are those of the model in full precision.

    Memory: one block's activations for all images, float32; the pattern has heads x t^2 values an image.

    Args:
        stream: the model.
        images: to calibrate on, preprocessed.
        widths: of the codes to choose from.
        means: which grids.
        token_weights: block -> site -> what each token counts when grids are judged by output; ones by default.
        micro_batch: images computed at once.
        blocks: whose grids are found; by default all. Places of a block do not depend on which others are asked for.
        on_block: called behind every block with its index and places; with none, if it was not asked for.

    Raises:
        ModelError: no table says which norms make the sites.
        QuantizationError: a width that no grid has, or activations that are not finite.
    """
    if stream.architecture not in NORMS:
        raise ModelError(f"{stream.architecture}: its activations cannot be quantized; supported: {list(NORMS)}")
    norms = NORMS[stream.architecture] if Means.CHANNELS in means else {}
    with stream.embedding():
        hidden = [stream.embed(batch) for batch in images.split(micro_batch)]
    found: dict[tuple[int, str], Place] = {}
    wanted = frozenset(range(stream.num_blocks) if blocks is None else blocks)
    for index, block in stream.stream(range(max(wanted, default=-1) + 1)):
        size = BatchSize(
            images=len(images),
            rows=sum(batch.shape[0] * batch.shape[1] for batch in hidden),
            tokens=sum(stream.num_tokens(index, batch) for batch in hidden),
        )
        with torch.no_grad(), recorded(stream, index, block) as seen:
            hidden = [stream.run(block, index, batch) for batch in hidden]
        if index not in wanted:  # run as the others are all the same: the next block's inputs must not depend on it
            on_block(index, {})
            continue
        activations = {place: torch.cat(parts).float() for place, parts in seen.items()}
        mask = activations.pop(MASK, None)
        errors = _errors(stream, index, block, activations, mask, size, means, (token_weights or {}).get(index, {}))
        folded = {site: _shared_zero(stream, index, site, activations[site], size) for site in stream.sites(index)}
        for name, x in activations.items():
            shared_zero = folded[name] if name in norms else None
            candidates = {width: _candidate(x, name, width, errors[name], means, shared_zero) for width in widths}
            found[index, name] = Place(num_values=x.numel() // len(images), row=x.shape[-1], candidates=candidates)
        on_block(index, {key: place for key, place in found.items() if key[0] == index})
    return Calibration(places=found)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSize:
    """How much there is at the input of one block."""

    images: int
    rows: int
    """Tokens at this block."""
    tokens: int
    """Tokens at the first block, over which costs are means."""


def _shared_zero(stream: BlockStream, index: int, site: str, x: Tensor, size: BatchSize) -> bool:
    """Whether folding may not shift a site: windows are padded, or a layer has no bias (lrpq.activations.folding)."""
    layers = [stream.model.get_submodule(spec.name) for spec in stream.sites(index)[site]]
    return len(x) != size.rows or any(layer.bias is None for layer in layers)


def _candidate(
    x: Tensor, name: str, width: int, error: Error, means: Means, shared_zero: bool | None = None
) -> Candidate:
    """Best grid; with ``shared_zero`` given, a grid a channel, with or without one code for zero."""
    shares = SHARES if Means.CLIPPED in means else UNCLIPPED
    if shared_zero is not None:
        by_channel = best(channel_candidates(x, width, shares=shares, shared_zero=shared_zero), error)
        folding = folding_of(by_channel, shared_zero=shared_zero)
        return Candidate(grid=folding.grid, folding=folding, cost=error(by_channel))
    grid: ActivationGrid
    if name == PATTERN and Means.LOGARITHMIC in means:
        grid = best(pattern_candidates(x, width, shares=shares), error)
    else:
        shifted = name == AFTER_ACTIVATION and Means.SHIFTED in means
        grid = best(tensor_candidates(x, width, shares=shares, low=float(x.amin()) if shifted else None), error)
    return Candidate(grid=grid, folding=None, cost=error(grid))


def _errors(
    stream: BlockStream,
    index: int,
    block: nn.Module,
    activations: Mapping[str, Tensor],
    mask: Tensor | None,
    size: BatchSize,
    means: Means,
    weights: Mapping[str, Tensor],
) -> dict[str, Error]:
    """What the grids of every site and point are judged by."""
    if Means.JUDGED_BY_OUTPUT not in means:
        return {place: squared_error(x) for place, x in activations.items()}
    found: dict[str, Error] = {}
    rows: dict[str, Tensor] = {}
    counts = {site: _counted(weights.get(site), len(activations[site]), size) for site in stream.sites(index)}
    for site, members in stream.sites(index).items():
        layers = [block.get_submodule(stream.local_name(spec)) for spec in members]
        rows[site] = torch.cat([layer.get_parameter("weight").float() for layer in layers])
        found[site] = site_error(activations[site], rows[site], counts[site])
    module = attention_of(stream, block)
    if module is None:
        return found
    query, key, value, pattern = (activations[point] for point in (QUERY, KEY, VALUE, PATTERN))
    attention = AttentionError(
        query,
        key,
        value,
        pattern,
        mask=mask,
        scaling=float(getattr(module, "scaling", query.shape[-1] ** -0.5)),
        W=rows[AFTER_ATTENTION],
        s=counts[AFTER_ATTENTION],
        windows=len(query) // size.images,
    )
    return found | {point: attention.of(point) for point in POINTS}


def _counted(s: Tensor | None, rows: int, size: BatchSize) -> Tensor | None:
    """Token weights of a site whose mean over its rows is one over the first block's tokens."""
    if rows == size.tokens:
        return s
    return (torch.ones(rows) if s is None else s) * (rows / size.tokens)


@contextmanager
def recorded(stream: BlockStream, index: int, block: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Inside, every forward of a block adds what its sites [tokens, d_in] and points of attention [n, ..] hold."""
    seen: dict[str, list[Tensor]] = {}

    def note(place: str, x: Tensor) -> None:
        seen.setdefault(place, []).append((x if place in (*POINTS, MASK) else x.flatten(0, -2)).detach())

    with watched(stream, index, block, note, points=(*POINTS, MASK)):
        yield seen


@contextmanager
def watched(
    stream: BlockStream,
    index: int,
    block: nn.Module,
    note: Callable[[str, Tensor], None],
    *,
    points: Sequence[str] = POINTS,
) -> Iterator[None]:
    """Inside, every forward of a block shows its sites [n, t, d_in] and points of attention [n, ..] by name."""

    def site_hook(site: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, arguments: note(site, arguments[0])

    def shown(point: str, x: Tensor) -> Tensor:
        note(point, x)
        return x

    handles = [
        block.get_submodule(stream.local_name(members[0])).register_forward_pre_hook(site_hook(site))
        for site, members in stream.sites(index).items()
    ]
    shown_at = {point: (lambda x, point=point: shown(point, x)) for point in points}
    try:
        with with_points(attention_of(stream, block), shown_at):
            yield
    finally:
        for handle in handles:
            handle.remove()


def attention_of(stream: BlockStream, block: nn.Module) -> nn.Module | None:
    """The attention module of a block; what merges patches has none."""
    (unit,) = [unit for unit in stream.family.units if unit.returns_tuple]
    return dict(block.named_modules()).get(unit.path)
