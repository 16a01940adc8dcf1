"""The curvature with which costs are predicted: c H has the trace that the Fisher information of the weights has.

The Fisher information of a layer's weights has the blocks mean_t g_tj^2 x_t x_t^T, one for each row j. Costs take c_j H
for them, a product of means: c_j = mean_t g_tj^2, H over tokens that are weighed by s_t (docs/methods.md). Where tokens
with large gradients have small inputs the product is far too large, and by another factor in every layer. So it is
behind a norm, say, whose gradients are the longer the shorter what it is given: in Gemma 3, which norms what a block
adds, by 1 to 160 (docs/log.md). What the product is to be on average over all directions is known at no cost,

    mean_t |g_t|^2 |x_t|^2,

the trace of all blocks together, and one factor for the layer makes it so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def matched_curvature(
    c: Float[Tensor, "rows=d_out"], trace: Float[Tensor, ""] | float, H: Float[Tensor, "d_in d_in"]
) -> Float[Tensor, "rows=d_out"]:
    """c times the factor that gives all c_j H together the trace; c where there is none to give.

    Args:
        c: mean_t g_tj^2, float64.
        trace: mean_t |g_t|^2 |x_t|^2, over the same tokens.
        H: of the costs, normalized.

    Returns:
        float64, on H's device.
    """
    c = c.to(H.device, torch.float64)
    product = c.sum() * H.diagonal().sum(dtype=torch.float64)
    wanted = torch.as_tensor(trace, dtype=torch.float64, device=H.device).squeeze()
    return c * torch.where(product > 0, wanted / product, 1.0)
