"""What a classifier's head reads of the hidden states: one vector an image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class FirstToken(nn.Module):
    """The class token, which ViT and DeiT put before the patches."""

    def forward(self, hidden: Float[Tensor, "n t h"]) -> Float[Tensor, "n 1 h"]:
        """Contiguous, so that the head computes on the memory layout that the model's own forward gives it."""
        first: Tensor = hidden[:, :1].contiguous()
        return first


class MeanToken(nn.Module):
    """The mean of all tokens, as Swin takes it: by PyTorch's kernel for it, whose order of summation is its own."""

    def forward(self, hidden: Float[Tensor, "n t h"]) -> Float[Tensor, "n 1 h"]:
        """Mean over the tokens."""
        mean: Tensor = functional.adaptive_avg_pool1d(hidden.transpose(1, 2), 1).transpose(1, 2)
        return mean


class FirstTokenAndMean(nn.Module):
    """DINOv2's: the class token, and beside it the mean of the patches."""

    def forward(self, hidden: Float[Tensor, "n t h"]) -> Float[Tensor, "n 1 2*h"]:
        """Both, one behind the other."""
        return torch.cat([hidden[:, 0], hidden[:, 1:].mean(dim=1)], dim=1).unsqueeze(1)
