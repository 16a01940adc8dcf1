"""What an error at one place does to an image's prediction: one scale for activations and weights.

Let x_t change by dx_t at one place of the model, in all tokens t of an image at once. To second order the prediction
changes by a divergence of 1/2 E[(sum_t g_t . dx_t)^2] nats, g the gradients of lrpq.relevance.probes. The sum over
tokens stands inside the square: rounding errors of neighbours pull in one direction, and the products that
docs/methods.md, section 1, leaves out are most of the divergence of an image (section 8 has the figures). A backward
pass gives g at every place, so a place costs one scalar product an image and width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lrpq.activations.calibrate import watched
from lrpq.activations.grids import ActivationGrid, placed, quantized
from lrpq.model.layers import Choice
from lrpq.model.streaming import BlockStream
from lrpq.quant.grid import QuantizedWeight
from lrpq.relevance.attribute import block_backward
from lrpq.relevance.passes import widen
from lrpq.relevance.probes import ProbeSweep, probed
from lrpq.relevance.rules import Pass

if TYPE_CHECKING:
    from jaxtyping import Float

DRAWS = 2
"""Of v an image, a backward pass each; one ranks places nearly as well (docs/methods.md, section 8)."""

PlaceGrids = Mapping[tuple[int, str], Mapping[int, ActivationGrid]]
"""(block, site or point) -> width -> grid."""
ModuleWeights = Mapping[str, Sequence[QuantizedWeight]]
"""Module -> ways of rounding it, of different choices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Responses:
    """sum_t g_t . dx_t, float64, an entry an image and draw, in parts."""

    places: dict[tuple[int, str, int], list[Tensor]] = field(default_factory=dict)
    """(block, site or point, width)."""
    modules: dict[tuple[str, Choice], list[Tensor]] = field(default_factory=dict)
    """(module, choice)."""

    def costs(self) -> Costs:
        """Half the mean square over images and draws."""
        return Costs(
            places={key: _halved_mean_square(parts) for key, parts in self.places.items()},
            modules={key: _halved_mean_square(parts) for key, parts in self.modules.items()},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Nats an image of everything alone."""

    places: Mapping[tuple[int, str, int], float]
    """(block, site or point, width)."""
    modules: Mapping[tuple[str, Choice], float]
    """(module, choice)."""


def averaged(found: Sequence[Costs]) -> Costs:
    """Mean of the costs of several draws over the same images, of the same places and modules."""
    return Costs(
        places={key: math.fsum(costs.places[key] for costs in found) / len(found) for key in found[0].places},
        modules={key: math.fsum(costs.modules[key] for costs in found) / len(found) for key in found[0].modules},
    )


def _halved_mean_square(parts: Sequence[Tensor]) -> float:
    return 0.5 * float(torch.cat(list(parts)).square().mean())


def responses(
    stream: BlockStream,
    images: Float[Tensor, "n channels height width"],
    grids: PlaceGrids,
    weights: ModuleWeights,
    *,
    seed: int,
    draws: Iterable[int] = range(DRAWS),
    micro_batch: int = 32,
    kept_bytes: int = 8 << 30,
    on_batch: Callable[[], None] = lambda: None,
) -> Responses:
    """Responses of every image to every grid and every way of rounding weights, each alone.

    Costs two forward passes and a backward pass a draw, and the products of each way of rounding.

    Args:
        stream: the classifier.
        images: to calibrate on, preprocessed.
        grids: of activations.
        weights: of layers.
        seed: of the draws.
        draws: numbers of the draws.
        micro_batch: images computed at once.
        kept_bytes: host memory for block inputs before they spill to disk.
        on_batch: called whenever a micro-batch has run.

    Raises:
        ModelError: not an image classifier.
    """
    found = Responses()
    grids = {key: {width: placed(grid, stream.device) for width, grid in each.items()} for key, each in grids.items()}
    for draw in draws:
        with probed(
            _Responding,
            stream,
            images,
            draw=draw,
            seed=seed,
            micro_batch=micro_batch,
            kept_bytes=kept_bytes,
            on_batch=on_batch,
        ) as sweep:
            assert isinstance(sweep, _Responding)
            for block, module in stream.stream(range(stream.num_blocks - 1, -1, -1)):
                sweep.respond(block, module, grids, weights, found)
    return found


class _Responding(ProbeSweep):
    def respond(
        self, block: int, module: nn.Module, grids: PlaceGrids, weights: ModuleWeights, found: Responses
    ) -> None:
        """Walk one block back and add what its places and modules give."""
        (shard,) = self.shards
        sites = {
            site: [(spec.name, module.get_submodule(self.stream.local_name(spec))) for spec in members]
            for site, members in self.stream.sites(block).items()
        }
        changes = {
            name: {q.choice: _change(q, layer) for q in weights.get(name, ())}
            for members in sites.values()
            for name, layer in members
        }
        for position in range(len(self.batches(shard))):
            hidden = self.kept.take((block, shard.index, position))
            n, upstream = len(hidden), self.upstream[shard.index, position]

            def note(place: str, x: Tensor, n: int = n) -> None:
                values = x.detach()

                def respond(g: Tensor) -> None:
                    for width, grid in grids.get((block, place), {}).items():
                        error = widen(quantized(values, grid)) - widen(values)
                        found.places.setdefault((block, place, width), []).append(_by_image(widen(g) * error, n))

                x.register_hook(respond)  # type: ignore[no-untyped-call]

            def observe(name: str, _: Pass, x: Tensor, __: Tensor, g: Tensor, n: int = n) -> None:
                for choice, dW in changes[name].items():
                    u = _by_image(widen(g) * (widen(x) @ dW.T), n)
                    found.modules.setdefault((name, choice), []).append(u)

            arguments = self.stream.call_arguments(block, (hidden.shape[0], hidden.shape[1]))
            with watched(self.stream, block, module, note):
                result = block_backward(
                    module, arguments, hidden, upstream, sites, switch=self.switch, observer=observe
                )
            self.upstream[shard.index, position] = result.gradients
            self.on_batch()


def _change(quantized_weight: QuantizedWeight, layer: nn.Module) -> Float[Tensor, "d_out d_in"]:
    W = widen(layer.get_parameter("weight"))
    return quantized_weight.dequantize(W.dtype).to(W.device) - W


def _by_image(products: Tensor, n: int) -> Float[Tensor, "images=n"]:
    return products.reshape(n, -1).sum(1, dtype=torch.float64).cpu()
