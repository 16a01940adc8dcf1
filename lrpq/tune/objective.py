"""What an error of a block's outputs costs the prediction: the objective of reconstruction.

    together    1/2 mean_i E[(sum_t g_t . e_t)^2]                      nats an image
    apart       1/2 mean_i sum_tj s_t c_j e_tj^2,   s_t = mean_j E[g_tj^2],   c = mean_t E[g_t^2] over its mean

with e the error of the block's outputs and g the gradients of lrpq.relevance.probes there. The first is the divergence
to second order, known for few images in few directions; the second is its diagonal with tokens and channels separated,
as BRECQ (Li et al. 2021, arXiv:2102.05426) weighs errors by squared gradients and APHQ-ViT (Wu et al. 2025,
arXiv:2504.02508) by a perturbation's mean. The diagonal sees all directions, and keeps a fit to the first from
spoiling those that no draw has shown.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from lrpq.relevance.passes import widen

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockError:
    """Of one block."""

    gradients: Float[Tensor, "draws n t h"]
    tokens: Float[Tensor, "n t"]
    """s."""
    channels: Float[Tensor, "channels=h"]
    """c."""
    together: float
    """Share of the first; the rest is the second's."""

    def __call__(self, error: Float[Tensor, "k t h"], images: Int[Tensor, "images=k"]) -> Float[Tensor, ""]:
        """Nats an image, of some images."""
        g, error = self.gradients[:, images], widen(error)
        whole = (g * error).sum((-2, -1)).square().mean()
        apart = ((error.square() * self.channels).sum(-1) * self.tokens[images]).sum(-1).mean()
        total: Tensor = 0.5 * (self.together * whole + (1 - self.together) * apart)
        return total


def block_error(gradients: Float[Tensor, "draws n t h"], *, together: float) -> BlockError:
    """The objective of a block from gradients at its output."""
    squares = gradients.square().mean(0)
    by_channel = squares.mean((0, 1))
    mean = by_channel.mean()
    channels = by_channel / mean if bool(mean > 0) else by_channel + 1
    return BlockError(gradients=gradients, tokens=squares.mean(-1), channels=channels, together=together)
