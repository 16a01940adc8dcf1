"""Token weights: from sums of squared gradients to how much a token counts in a Hessian."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lrpq.errors import QuantizationError
from lrpq.relevance.attribute import ModuleStats
from lrpq.relevance.composite import Relevance
from lrpq.relevance.rules import Pass

DEFAULT_FLOOR = 0.03  # the prototype's; keeps H well conditioned where few tokens hold most of the relevance


NO_RELEVANCE = 1e-20
"""Weight of every token of a micro-batch that no gradient reaches: small beside any other, and all alike."""


def has_relevance(weight_sum: float, num_tokens: int) -> bool:
    """Whether any gradient reached a site, from the sum of its token weights."""
    return weight_sum > 1.5 * NO_RELEVANCE * num_tokens


def token_weights(
    modules: Sequence[ModuleStats],
    relevance: Relevance,
    *,
    site: str,
    floor: float = DEFAULT_FLOOR,
    power: float = 1.0,
) -> Tensor:
    """Weights s_t [tokens] of a site's tokens in H = sum_t s_t x_t x_t^T: fp32 (fp64 for fp64), non-negative.

    Of one module, s_t = mean_j g_tj^2 of the pass. The absolute scale is kept: it says what a token counts
    against those of other micro-batches. BLEND is sqrt(s^fisher s^lrp) of each module, rescaled so that its
    mean over the micro-batch is the Fisher's (the scale of the LRP pass cancels). The site's s is the plain
    average over its modules; ``floor`` times its mean over the micro-batch is then added, and the sum is raised to
    ``power``. Below 1 the power flattens the weights: with few tokens, sharp ones fit the codes to the calibration
    text. NONE: ones. Where no gradient arrives (behind a layer of zeros), all tokens weigh ``NO_RELEVANCE``: the site's
    Hessian is then the unweighted one, `has_relevance` says so of the sums, and whoever reports counts it.

    Raises:
        QuantizationError: the weights are not finite.
    """
    if relevance is Relevance.NONE:
        return torch.ones_like(modules[0].token_sums[Pass.FISHER])
    wide = torch.stack([_module_weights(stats, relevance) for stats in modules]).mean(dim=0)
    weights = (wide + floor * wide.mean()).pow(power).to(modules[0].token_sums[Pass.FISHER].dtype)
    if not bool(torch.isfinite(weights).all()):
        raise QuantizationError(
            f"site {site}: the {relevance.value} weights of its tokens are not finite; check the model's values, "
            "or use relevance none"
        )
    if not bool(weights.sum() > 0):
        return torch.full_like(weights, NO_RELEVANCE)
    return weights


def squared_gradients(modules: Sequence[ModuleStats], *, site: str) -> Tensor:
    """Mean squared gradient at the outputs of a site's layers [tokens]: the Fisher's weights as they are.

    Half of it times the squared error of the outputs, summed over them, is nats to second order, a token's outputs
    sharing their mean.

    Raises:
        QuantizationError: see ``token_weights``.
    """
    return token_weights(modules, Relevance.FISHER, site=site, floor=0.0, power=1.0)


def _module_weights(stats: ModuleStats, relevance: Relevance) -> Tensor:
    """In float64: means, ratios and powers of sums near either end of fp32's range leave it."""
    s: dict[Pass, Tensor] = {running: stats.token_sums[running].double() / stats.d_out for running in relevance.passes}
    if relevance is not Relevance.BLEND:
        return s[relevance.passes[-1]]
    blend = (s[Pass.FISHER] * s[Pass.LRP]).sqrt()
    mean = blend.mean()
    # A mean of zero: no token matters to both passes, and there is nothing to rescale.
    return torch.where(mean > 0, blend * (s[Pass.FISHER].mean() / mean), blend)
