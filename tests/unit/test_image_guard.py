"""On images a result is worse where the images say so together, not where one of them does."""

from __future__ import annotations

import random
import statistics
from dataclasses import asdict
from typing import Any

import pytest

from flows.guard import DIFFERENCE_ERROR, OURS, UNIFORM, Windows, better
from tasks.image_scores import paired_error, summarize

HELD_OUT = 64


def scores_of(ours: list[float], uniform: list[float]) -> dict[str, dict[str, Any]]:
    rows = {name: [(True, True, kl) for kl in found] for name, found in ((OURS, ours), (UNIFORM, uniform))}
    scores = {name: asdict(summarize(found, labelled=False)) for name, found in rows.items()}
    scores[OURS][DIFFERENCE_ERROR] = paired_error(rows[OURS], rows[UNIFORM])
    return scores


def sure(seed: int) -> list[float]:
    """Divergences of a model that is sure of nearly all images."""
    draw = random.Random(seed)
    return [draw.lognormvariate(-8, 2) for _ in range(HELD_OUT)]


def test_the_error_is_that_of_paired_differences() -> None:
    ours, uniform = sure(1), sure(2)
    expected = statistics.stdev(a - b for a, b in zip(ours, uniform, strict=True)) / HELD_OUT**0.5
    assert scores_of(ours, uniform)[OURS][DIFFERENCE_ERROR] == pytest.approx(expected)
    assert paired_error([(True, True, 1.0)], [(True, True, 2.0)]) is None


def test_one_image_does_not_throw_a_result_away() -> None:
    uniform = sure(0)
    ours = [kl * 0.7 for kl in uniform]
    ours[5] += 0.2
    scores = scores_of(ours, uniform)
    assert scores[OURS]["kl_nats"] > scores[UNIFORM]["kl_nats"]
    assert better(scores, Windows.IMAGES) == OURS
    assert better(scores, Windows.TEXT) == UNIFORM  # where a window has hundreds of predictions, means are compared


@pytest.mark.parametrize("seed", range(5))
def test_a_plan_that_went_wrong_is_heard(seed: int) -> None:
    uniform, draw = sure(seed), random.Random(seed)
    assert better(scores_of([kl + draw.uniform(0.0, 0.2) for kl in uniform], uniform), Windows.IMAGES) == UNIFORM
    assert better(scores_of(uniform, uniform), Windows.IMAGES) == OURS
    assert better(scores_of([2e-3], [1e-3]), Windows.IMAGES) == UNIFORM  # of one image nothing else is known
