"""The error of the product that follows an activation: what a clipped range is judged by.

    a site's layers:        1/2 mean_t s_t |W (x^_t - x_t)|^2, W the rows of all its layers
    a point of attention:   the same of the output projection, the other three points exact

With s_t the mean squared gradient at the outputs (token weights ``fisher``, power 1, no floor) this is nats per token:
the second-order Fisher cost of docs/methods.md, section 1, the outputs of a token sharing its mean. An image's tokens
differ widely in what they matter: of the last block only the class token is read. Without s all count alike, and the
unit is that of the outputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrpq.activations.attention import KEY, PATTERN, QUERY, VALUE
from lrpq.activations.clipping import Error
from lrpq.activations.grids import ActivationGrid, quantized

if TYPE_CHECKING:
    from jaxtyping import Float

MAX_TOKENS = 2048
"""The heaviest, that a site's grids are judged on."""
MAX_IMAGES = 16
"""The heaviest, for the points of attention."""


def site_error(
    x: Float[Tensor, "tokens d_in"], W: Float[Tensor, "d_out d_in"], s: Float[Tensor, "weights=tokens"] | None = None
) -> Error:
    """Of the outputs of a site's layers, stacked."""
    weights = torch.ones(len(x), device=x.device) if s is None else s.to(x.device)
    chosen = _heaviest(weights, MAX_TOKENS)
    sample, scaled = x[chosen], _in_place_of_all(weights, weights[chosen])
    return lambda grid: _weighted((quantized(sample, grid) - sample) @ W.T, scaled)


def _heaviest(s: Float[Tensor, "weights=n"], count: int) -> Tensor:
    """Indices of the largest weights; of equal ones, evenly strided. Of a model that is sure of most images, a few of
    them hold nearly all of the squared gradient, and an even draw misses them."""
    if bool((s == s[0]).all()):
        return torch.arange(0, len(s), -(-len(s) // count), device=s.device)
    found: Tensor = s.topk(min(count, len(s))).indices.sort().values
    return found


def _in_place_of_all(s: Tensor, chosen: Tensor) -> Float[Tensor, "weights=n"]:
    """Weights of the chosen that sum to the mean of all."""
    scaled: Tensor = chosen.double() * (s.double().mean() / chosen.double().sum())
    return scaled


def _weighted(dy: Float[Tensor, "tokens d_out"], s: Float[Tensor, "weights=tokens"]) -> float:
    return 0.5 * float((s * dy.double().square().sum(1)).sum())


class AttentionError:
    """Args:
    query: [n, heads, t, d_head], and so ``key`` and ``value``.
    pattern: softmax's outputs [n, heads, t, t].
    mask: what is added to the scores [n, heads, t, t], such as a bias by position; None where nothing is.
    scaling: of the scores.
    W: of the output projection [h, heads d_head].
    s: weights of its tokens [n t], or None for ones.
    windows: of an image, each of which counts in n.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pattern: Tensor,
        *,
        scaling: float,
        W: Tensor,
        s: Tensor | None = None,
        mask: Tensor | None = None,
        windows: int = 1,
    ) -> None:
        ones = torch.ones(len(query), query.shape[2], device=query.device)
        weights = ones if s is None else s.view(len(query), -1).to(query.device)
        chosen = _heaviest(weights.sum(1), MAX_IMAGES * windows)
        self.weights = _in_place_of_all(weights, weights[chosen]).flatten()
        self.query, self.key, self.value = query[chosen], key[chosen], value[chosen]
        self.pattern, self.scaling = pattern[chosen], scaling
        self.mask = None if mask is None else mask[chosen]
        self.output = self.pattern @ self.value
        self.W = W

    def of(self, point: str) -> Error:
        """Error of a grid at one of the four points."""

        def error(grid: ActivationGrid) -> float:
            difference = (self._output(point, grid) - self.output).transpose(1, 2).flatten(2).flatten(0, 1)
            return _weighted(difference @ self.W.T, self.weights)

        return error

    def _output(self, point: str, grid: ActivationGrid) -> Tensor:
        query = quantized(self.query, grid) if point == QUERY else self.query
        key = quantized(self.key, grid) if point == KEY else self.key
        value = quantized(self.value, grid) if point == VALUE else self.value
        pattern = self.pattern
        if point in (QUERY, KEY):
            scores = query @ key.transpose(-1, -2) * self.scaling
            pattern = torch.softmax(scores if self.mask is None else scores + self.mask, dim=-1)
        elif point == PATTERN:
            pattern = quantized(pattern, grid)
        output: Tensor = pattern @ value
        return output
