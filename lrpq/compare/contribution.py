"""LRP-QViT's mixed widths: the layers that most relevance passes through get the most bits.

Ranjan and Savakis 2024 (arXiv:2401.11243) sum the relevance of the explained class that passes through a layer over
images, normalise it over all layers to a contribution score W_l, and choose the widths b_l from {3, 4, 5} (MP4) or
{5, 6, 7} (MP6) by an integer program under a limit on their average. As an integer program of one score a layer:

    maximise  sum_l W_l b_l      under      sum_l n_l b_l <= average sum_l n_l.

Nothing in it knows what a bit more saves, which is where curvature costs begin. Deviations: their text could be read in
summary only, the form of the objective is the plainest one; n_l is storage, scales included, and for activations the
number of values an image, so that budgets are those of `lrpq.compare.vision`; the score of a layer's inputs is the
relevance of all layers that read them, that of attention's queries, keys and values the relevance of the layer that
makes them, that of its pattern the values', for AttnLRP gives both factors of a product the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lrpq.activations.allocate import allocate_widths
from lrpq.activations.attention import KEY, PATTERN, QUERY, VALUE
from lrpq.activations.calibrate import Calibration
from lrpq.allocate.plan import Plan
from lrpq.allocate.problem import CostRow
from lrpq.compare import allocation
from lrpq.errors import QuantizationError
from lrpq.importance.gather import BlockEvidence
from lrpq.model.layers import Choice
from lrpq.model.streaming import BlockStream

MEASURE = "relevance-magnitude"
"""What has to be asked of a walk."""
Scores = Mapping[str, float]
"""Module -> share of all modules' relevance."""


def contributions(evidence: Mapping[int, BlockEvidence]) -> dict[str, float]:
    """Contribution scores, which sum to one.

    Args:
        evidence: by block, of a walk with an LRP pass.

    Raises:
        QuantizationError: no relevance was found anywhere.
    """
    relevance = {name: float(sums.relevance) for found in evidence.values() for name, sums in found.modules.items()}
    total = math.fsum(relevance.values())
    if not total > 0 or not math.isfinite(total):
        raise QuantizationError(
            f"contribution scores: the relevance of all layers together is {total:g}; expected more"
        )
    return {name: value / total for name, value in relevance.items()}


def weight_widths(rows: Sequence[CostRow], scores: Scores, *, budget_bits: float) -> Plan:
    """The integer program of the weights, solved exactly; its cost is the loss of score, no nats.

    Args:
        rows: choices of all modules.
        scores: contributions.
        budget_bits: all-in.
    """
    widest = max(row.choice.bits for row in rows if row.choice is not None)
    losses: dict[str, dict[Choice, float]] = {}
    for row in rows:
        if row.choice is not None:
            name = row.module.name
            losses.setdefault(name, {})[row.choice] = scores[name] * (widest - row.choice.bits)
    return allocation.by_costs(allocation.with_costs(rows, losses), budget_bits=budget_bits)


def activation_widths(
    calibration: Calibration, stream: BlockStream, scores: Scores, *, average_bits: float
) -> dict[tuple[int, str], int]:
    """The integer program of the activations: (block, site or point) -> width."""
    shares = place_scores(calibration, stream, scores)
    widest = max(width for place in calibration.places.values() for width in place.candidates)
    losses = {
        (*key, width): shares[key] * (widest - width)
        for key, place in calibration.places.items()
        for width in place.candidates
    }
    return allocate_widths(calibration, average_bits=average_bits, costs=losses)


def place_scores(calibration: Calibration, stream: BlockStream, scores: Scores) -> dict[tuple[int, str], float]:
    """(block, site or point) -> contribution of what is computed there."""
    found: dict[tuple[int, str], float] = {}
    for block, place in calibration.places:
        sites = stream.sites(block)
        if place in sites:
            found[block, place] = math.fsum(scores[spec.name] for spec in sites[place])
            continue
        query, key, value = sites["qkv"]
        maker = {QUERY: query, KEY: key, VALUE: value, PATTERN: value}[place]
        found[block, place] = scores[maker.name]
    return found
