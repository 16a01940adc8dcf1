"""The error of the product that follows an activation: what a clipped range is judged by.

    a site's layers:        mean s_t |W (x^_t - x_t)|^2 over tokens, W the rows of all its layers
    a point of attention:   the same of the output projection, the other three points exact

s are token weights such as those of the Hessians (relevance/weights.py), or ones. An image's tokens differ widely in
what they matter: of the last block only the class token is read.
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
"""Evenly strided, that a site's grids are judged on."""
MAX_IMAGES = 16
"""Evenly strided, for the points of attention."""


def site_error(
    x: Float[Tensor, "tokens d_in"], W: Float[Tensor, "d_out d_in"], s: Float[Tensor, "weights=tokens"] | None = None
) -> Error:
    """Of the outputs of a site's layers, stacked."""
    stride = -(-len(x) // MAX_TOKENS)
    sample = x[::stride]
    weights = torch.ones(len(x), device=x.device) if s is None else s.to(x.device)
    return lambda grid: _weighted((quantized(sample, grid) - sample) @ W.T, weights[::stride])


def _weighted(dy: Float[Tensor, "tokens d_out"], s: Float[Tensor, "weights=tokens"]) -> float:
    return float((s.double() * dy.double().square().mean(1)).sum() / s.double().sum())


class AttentionError:
    """Args:
    query: [n, heads, t, d_head], and so ``key`` and ``value``.
    pattern: softmax's outputs [n, heads, t, t], from which the scale of the scores follows.
    scaling: of the scores.
    W: of the output projection [h, heads d_head].
    s: weights of its tokens [n t], or None for ones.
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
    ) -> None:
        stride = -(-len(query) // MAX_IMAGES)
        self.query, self.key, self.value = query[::stride], key[::stride], value[::stride]
        self.pattern, self.scaling = pattern[::stride], scaling
        self.output = self.pattern @ self.value
        self.W = W
        weights = torch.ones(len(query), query.shape[2]) if s is None else s.view(len(query), -1)
        self.weights = weights[::stride].flatten().to(query.device)

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
            pattern = torch.softmax(query @ key.transpose(-1, -2) * self.scaling, dim=-1)
        elif point == PATTERN:
            pattern = quantized(pattern, grid)
        output: Tensor = pattern @ value
        return output
