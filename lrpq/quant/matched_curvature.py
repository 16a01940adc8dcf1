"""The curvature with which costs are predicted: c H has the trace that the Fisher information of the weights has.

The Fisher information of a layer's weights has the blocks mean_t g_tj^2 x_t x_t^T, one for each row j. Costs take c_j H
for them, a product of means: c_j = mean_t g_tj^2, H over tokens that are weighed by s_t (docs/methods.md). Where tokens
with large gradients have small inputs the product is far too large, and by another factor in every layer. So it is
behind a norm, say, whose gradients are the longer the shorter what it is given: in Gemma 3, which norms what a block
adds, by 1 to 160 (docs/log.md). What the product is to be on average over all directions is known at no cost,

    mean_t |g_t|^2 |x_t|^2,

the trace of all blocks together, and one factor for the layer makes it so.

A mean of products has heavier tails than a product of means. On a model with norms behind its MLPs one window in 128
has had 280,000 times what the middle one had, in one layer and in most before it: presumably a token for which a norm's
input nearly vanishes, whose gradients are then far longer than an error can matter there, for a unit vector stays one.
That window is all of the mean, and the layers get bits that others lack. So no window counts for more than ``MOST``
times what the middle one does: what every window has, like its first token's, counts in full, and what a few of them
have does not (docs/adr/0028-no-window-is-the-whole-trace.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


MOST = 4.0
"""Of a window over the median of those that reach the layer. On SmolLM2 7 of 128 x 210 are above (docs/log.md)."""


def matched_curvature(
    c: Float[Tensor, "rows=d_out"], trace: Float[Tensor, "*one"] | float, hessian_trace: Float[Tensor, ""] | float
) -> Float[Tensor, "rows=d_out"]:
    """c times the factor that gives all c_j H together the trace; c where c or H has none to scale.

    A trace of zero makes it zero: no gradient met an input, as far as float32 can tell.

    Args:
        c: mean_t g_tj^2, float64.
        trace: mean_t |g_t|^2 |x_t|^2, over the same tokens (`bounded_sum`).
        hessian_trace: of H, normalized, of the same inputs. The factor is one of the model that was profiled: where H
            is carried over to a folded model, whose costs are the same, it stays.

    Returns:
        float64, on c's device.
    """
    c = c.double()
    product = c.sum() * torch.as_tensor(hessian_trace, dtype=torch.float64, device=c.device)
    wanted = torch.as_tensor(trace, dtype=torch.float64, device=c.device).squeeze()
    return c * torch.where(product > 0, wanted / product, 1.0)


def bounded_sum(windows: Float[Tensor, "*windows"]) -> Float[Tensor, ""]:
    """Sum over windows of what each has of a trace, no more than ``MOST`` times the median of those that have any (of
    an even number the lower one of the two in the middle).

    Args:
        windows: sum_t |g_t|^2 |x_t|^2 of each, float64. One number, that of all windows, stays what it is.
    """
    median = windows.where(windows > 0, torch.nan).nanmedian().nan_to_num(0.0)
    return windows.minimum(MOST * median).sum()


def trace_of(H: Float[Tensor, "d_in d_in"]) -> Float[Tensor, ""]:
    """Sum of the diagonal, float64."""
    return H.diagonal().sum(dtype=torch.float64)
