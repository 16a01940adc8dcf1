"""What a classifier's head reads of the hidden states: one position an image."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class FirstToken(nn.Module):
    """The class token, which ViT and DeiT put before the patches."""

    def forward(self, hidden: Float[Tensor, "n t h"]) -> Float[Tensor, "n 1 h"]:
        """Contiguous, so that the head computes on the memory layout that the model's own forward gives it."""
        first: Tensor = hidden[:, :1].contiguous()
        return first
