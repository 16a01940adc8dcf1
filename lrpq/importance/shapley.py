"""What a decoder block is worth among the others: Shapley values from progressive demotion.

CoopQ (Zhao et al. 2026, arXiv:2509.15455, first named IMPQ): the blocks are players of a game whose payoff is the loss
of the quantized model. All begin at a wide choice; in a random order they are demoted to a narrow one, and what the
loss grows by at a block's demotion is its marginal in that order. The mean over orders estimates its Shapley value, the
covariance between blocks' marginals how they meet. Beginning from a quantized model that works, and not from the
original or from nothing, is what keeps the estimates' variance small. Deviation: the payoff is the KL divergence from
the original instead of the text's own negative log-likelihood.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lrpq.errors import QuantizationError

HIGH, LOW = "high", "low"
"""Keys of a block's two choices."""

Payoffs = Callable[[Mapping[str, Sequence[Hashable]]], Mapping[str, Sequence[float]]]
"""From plans (name -> HIGH or LOW for every block) to the loss of each on every window."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Game:
    """Estimates over some orders of demotion."""

    values: tuple[float, ...]
    """Shapley value of every block, nats a token: their sum is what demoting all of them costs."""
    covariance: tuple[tuple[float, ...], ...]
    """Of the blocks' marginals over orders, unbiased; zero with one order."""
    num_orders: int


def demotion_orders(num_blocks: int, num_orders: int, *, seed: int) -> list[tuple[int, ...]]:
    """Random orders of the blocks, each with its reverse: in one of the two a block comes before another.

    Raises:
        QuantizationError: fewer than one order.
    """
    if num_orders < 1:
        raise QuantizationError(f"{num_orders} orders of demotion: expected 1 or more")
    drawn = np.random.default_rng(seed)
    orders: list[tuple[int, ...]] = []
    while len(orders) < num_orders:
        order = tuple(drawn.permutation(num_blocks).tolist())
        orders += [order, order[::-1]]
    return orders[:num_orders]


def progressive_demotion(num_blocks: int, orders: Sequence[Sequence[int]], payoffs: Payoffs) -> Game:
    """Demote the blocks in every order, one after the other, and estimate the game from the marginals.

    Args:
        num_blocks: players.
        orders: of all blocks.
        payoffs: measures plans; asked once for all.
    """
    plans: dict[str, tuple[Hashable, ...]] = {}
    for order in orders:
        for size in range(num_blocks + 1):
            low = frozenset(order[:size])
            plans[_name(low, num_blocks)] = tuple(LOW if block in low else HIGH for block in range(num_blocks))
    loss = {name: statistics.fmean(values) for name, values in payoffs(plans).items()}
    marginals = np.zeros((len(orders), num_blocks))
    for row, order in enumerate(orders):
        for size, block in enumerate(order):
            before, after = frozenset(order[:size]), frozenset(order[: size + 1])
            marginals[row, block] = loss[_name(after, num_blocks)] - loss[_name(before, num_blocks)]
    many = len(orders) > 1
    covariance = np.atleast_2d(np.cov(marginals, rowvar=False)) if many else np.zeros((num_blocks, num_blocks))
    return Game(
        values=tuple(marginals.mean(0).tolist()),
        covariance=tuple(tuple(row) for row in covariance.tolist()),
        num_orders=len(orders),
    )


def _name(low: frozenset[int], num_blocks: int) -> str:
    return "".join(LOW[0] if block in low else HIGH[0] for block in range(num_blocks))
