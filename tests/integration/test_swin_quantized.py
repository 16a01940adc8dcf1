"""A Swin trained in seconds, quantized whole by the sweeps of language models: top-1 and KL."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_images import gratings, train_classifier

from lrpq.activations.calibrate import Means
from lrpq.compare.recipes import CONTROL, DEFAULT, Recipe, Rounding
from lrpq.compare.terms import Terms
from lrpq.compare.vision import Behind, QuantizedClassifier, quantize_classifier, uniform_bits
from lrpq.evaluate.classification import ImageScores, score_images
from lrpq.model.source import open_source
from lrpq.model.streaming import BlockStream

NEAREST = replace(CONTROL, rounding=Rounding.NEAREST)
TERMS = Terms(dtype=torch.float32, micro_batch=32, shards=4)
CALIBRATION = gratings(32, seed=1)[0]
TEST = gratings(300, seed=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_classifier(tmp_path_factory.mktemp("trained") / "swin", "swin", steps=60)


def scored(
    folder: Path,
    scratch: Path,
    weights: tuple[int, ...],
    activations: tuple[int, ...],
    recipe: Recipe = DEFAULT,
    means: Means = Means.ALL,
) -> tuple[QuantizedClassifier, ImageScores, ImageScores]:
    """What was made, and the scores of the original and of it."""
    found = quantize_classifier(
        open_source(folder),
        CALIBRATION,
        weight_bits=weights,
        average_bits=sorted(weights)[len(weights) // 2],
        activation_bits=activations,
        recipe=recipe,
        folded=scratch / "folded",
        means=means,
        behind=Behind.ACTIVATIONS if recipe is DEFAULT else Behind.WEIGHTS,
        terms=TERMS,
    )
    stream = BlockStream(open_source(folder), dtype=torch.float32)
    scores = score_images(stream, *TEST, {"variant": (found.stream, found.variant)})
    return found, scores["reference"], scores["variant"]


def test_eight_bits_lose_nothing_and_four_beat_plain_rounding(folder: Path, tmp_path: Path) -> None:
    found, original, eight = scored(folder, tmp_path / "8", (8,), (8,))
    assert original.top1 > 0.8
    assert original.top1 - eight.top1 <= 0.01
    points = {"query", "key", "value", "pattern"}
    layer = {"qkv", "o", "up", "down"} | points
    assert [set(grids) for grids in found.grids] == [layer, layer, {"merge"}, layer, layer]
    assert set(found.codes) == {spec.name for spec in found.stream.specs}
    _, _, plain = scored(folder, tmp_path / "a", (4,), (4,), NEAREST, Means.NONE)
    _, _, ours = scored(folder, tmp_path / "c", (4,), (4,))
    kl = [float(scores.kl_nats.mean()) for scores in (plain, ours, eight)]
    assert kl[1] < 0.01 * kl[0]
    assert kl[2] < 0.1 * kl[1]
    assert original.top1 - ours.top1 < 0.05


def test_gptq_beats_rounding_and_mixed_widths_beat_one(folder: Path, tmp_path: Path) -> None:
    """Stages have different widths and numbers of tokens: what a layer costs counts them."""
    nearest, ours, mixed = (
        scored(folder, tmp_path, bits, (), recipe)
        for bits, recipe in (((3,), NEAREST), ((3,), DEFAULT), ((2, 3, 4), DEFAULT))
    )
    kl = [float(scores.kl_nats.mean()) for _, _, scores in (nearest, ours, mixed)]
    assert kl[1] < 0.3 * kl[0]
    assert kl[2] < 0.8 * kl[1]
    plan = mixed[0].plan
    assert plan is not None
    assert plan.average_bits <= uniform_bits(mixed[0].stream.specs, 3)
    assert plan.choices["swin.encoder.layers.0.downsample.reduction"] is not None
