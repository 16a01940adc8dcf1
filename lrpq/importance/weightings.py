"""Token weights of a Hessian under their published names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrpq.errors import QuantizationError
from lrpq.relevance.attribute import ModuleStats
from lrpq.relevance.composite import Relevance
from lrpq.relevance.weights import token_weights

if TYPE_CHECKING:
    from jaxtyping import Float

SMALLEST_SHARE = 0.005
"""Weight of the least attended token, as a share of the most attended one's (RSQ's r_min)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteTokens:
    """What a site's tokens can be weighed by, one micro-batch."""

    site: str
    stats: Sequence[ModuleStats]
    """Of the layers that read the site."""
    x: Float[Tensor, "tokens d_in"]
    attention: Float[Tensor, "n t"] | None
    """Attention that each token of a sequence receives in the block, summed over heads and queries."""
    floor: float
    power: float


ATTENTION, INVERSE_NORM = "attention", "inverse-norm"
Weighting = Callable[[SiteTokens], Tensor]
"""To s [tokens], finite and not negative."""


def none(tokens: SiteTokens) -> Tensor:
    """All alike: plain GPTQ."""
    return torch.ones(len(tokens.x), dtype=torch.float32, device=tokens.x.device)


def inverse_norm(tokens: SiteTokens) -> Tensor:
    """1 / |x_t|^2: a token has one vote whatever its size; one of zeros has none. What gradients have to beat."""
    squares = tokens.x.float().square().sum(-1)
    s: Tensor = torch.where(squares > 0, 1.0 / squares.clamp_min(torch.finfo(torch.float32).tiny), 0.0)
    return s


def attention_concentration(tokens: SiteTokens) -> Tensor:
    """RSQ (Sung et al. 2025, arXiv:2503.01820): what attention a token receives.

    Scaled to [r_min, 1] in each sequence, divided by its mean; tokens are multiplied by it, so s is its square.
    """
    if tokens.attention is None:
        raise QuantizationError(f"site {tokens.site}: attention weights were not recorded")
    received = tokens.attention.float()
    low, high = received.amin(1, keepdim=True), received.amax(1, keepdim=True)
    r = SMALLEST_SHARE + (1 - SMALLEST_SHARE) * (received - low) / (high - low).clamp_min(1e-30)
    s: Tensor = (r / r.mean(1, keepdim=True)).square().flatten()
    return s


def _gradient(relevance: Relevance) -> Weighting:
    def weigh(tokens: SiteTokens) -> Tensor:
        return token_weights(tokens.stats, relevance, site=tokens.site, floor=tokens.floor, power=tokens.power)

    return weigh


WEIGHTINGS: Mapping[str, Weighting] = {
    "none": none,
    INVERSE_NORM: inverse_norm,
    ATTENTION: attention_concentration,
    "fisher": _gradient(Relevance.FISHER),
    "lrp": _gradient(Relevance.LRP),
    "cp-lrp": _gradient(Relevance.CP_LRP),
    "blend": _gradient(Relevance.BLEND),
}
GRADIENTS: Mapping[str, Relevance] = {
    "fisher": Relevance.FISHER,
    "lrp": Relevance.LRP,
    "cp-lrp": Relevance.CP_LRP,
    "blend": Relevance.BLEND,
}
"""Weightings that need backward passes."""
