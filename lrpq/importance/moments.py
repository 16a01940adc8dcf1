"""Weighted sums over a layer's inputs from which those of scaled and shifted inputs follow exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class InputMoments:
    """sum_t w_t, sum_t w_t x_t and sum_t w_t x_t^2 by channel, float64; w not negative."""

    weight_sum: Float[Tensor, ""]
    first: Float[Tensor, " d_in"]
    second: Float[Tensor, " d_in"]

    def plus(self, x: Float[Tensor, "tokens d_in"], w: Float[Tensor, "weights=tokens"]) -> InputMoments:
        """With more tokens."""
        wide, weights = x.double(), w.double()
        return InputMoments(
            weight_sum=self.weight_sum + weights.sum(),
            first=self.first + weights @ wide,
            second=self.second + weights @ wide.square(),
        )

    def squares(
        self, factor: Float[Tensor, "channels=d_in"], term: Float[Tensor, "channels=d_in"]
    ) -> Float[Tensor, ""]:
        """sum_t w_t |x'_t|^2 of x' = factor x + term."""
        a, b = factor.to(self.first), term.to(self.first)
        return (a.square() * self.second + 2 * a * b * self.first + b.square() * self.weight_sum).sum()


def empty_moments(d_in: int, device: torch.device | str) -> InputMoments:
    """Of no tokens."""
    zeros = torch.zeros(d_in, dtype=torch.float64, device=device)
    return InputMoments(weight_sum=zeros.new_zeros(()), first=zeros, second=zeros)
