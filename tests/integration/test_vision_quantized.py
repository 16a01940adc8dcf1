"""A ViT trained in seconds, quantized whole: weights and activations, fixed and mixed widths; top-1 and KL."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_images import gratings, train_classifier

from lrpq.activations.apply import GridActivations, quantized_block
from lrpq.activations.attention import with_points
from lrpq.activations.calibrate import Means, attention_of, calibrate
from lrpq.activations.directional import responses
from lrpq.activations.folding import fold_plan
from lrpq.activations.grids import quantized
from lrpq.activations.operations import operations
from lrpq.checkpoint.activations import grid_document
from lrpq.classifier import load_classifier, write_classifier
from lrpq.compare.contribution import MEASURE, contributions
from lrpq.compare.prepared import asked_of
from lrpq.compare.recipes import CONTROL, DEFAULT, Recipe, Rounding
from lrpq.compare.shared_walk import SharedWalk
from lrpq.compare.terms import Terms
from lrpq.compare.vision import Behind, QuantizedClassifier, quantize_classifier, uniform_bits
from lrpq.compare.vision_widths import WidthBudget
from lrpq.compare.workbench import Workbench
from lrpq.errors import ConfigError
from lrpq.evaluate.classification import ImageScores, class_logits, score_images
from lrpq.model.source import open_source
from lrpq.model.streaming import BlockStream
from lrpq.quant.hessian import normalized
from lrpq.refine.products import merge_products
from lrpq.refine.sweep import RefineSweep
from lrpq.shards import root
from lrpq.transform.writing import write_folded

NEAREST = replace(CONTROL, rounding=Rounding.NEAREST)
TERMS = Terms(dtype=torch.float32, micro_batch=32, shards=4)
CALIBRATION = gratings(64, seed=1)[0]
TEST = gratings(600, seed=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_classifier(tmp_path_factory.mktemp("trained") / "vit", "vit")


@pytest.fixture(scope="module")
def stream(folder: Path) -> BlockStream:
    return BlockStream(open_source(folder), dtype=torch.float32)


def quantize(
    folder: Path,
    scratch: Path,
    weights: tuple[int, ...],
    activations: tuple[int, ...],
    recipe: Recipe = DEFAULT,
    means: Means = Means.ALL,
    behind: Behind = Behind.ACTIVATIONS,
    budget: WidthBudget = WidthBudget.APART,
) -> QuantizedClassifier:
    return quantize_classifier(
        open_source(folder),
        CALIBRATION,
        weight_bits=weights,
        average_bits=sorted(weights)[len(weights) // 2],
        activation_bits=activations,
        recipe=recipe,
        folded=scratch / "folded",
        means=means,
        behind=behind,
        budget=budget,
        terms=TERMS,
    )


def scored(stream: BlockStream, found: QuantizedClassifier) -> tuple[ImageScores, ImageScores]:
    scores = score_images(stream, *TEST, {"variant": (found.stream, found.variant)})
    return scores["reference"], scores["variant"]


def test_eight_bits_lose_next_to_nothing(folder: Path, stream: BlockStream, tmp_path: Path) -> None:
    found = quantize(folder, tmp_path, (8,), (8,))
    original, ours = scored(stream, found)
    assert original.top1 > 0.9
    assert original.top1 - ours.top1 <= 0.005
    assert float(ours.kl_nats.mean()) < 0.002
    write_classifier(
        found.stream.source,
        tmp_path / "out",
        quantized=found.codes.__getitem__,
        choices={name: weight.choice for name, weight in found.codes.items()},
        specs=found.stream.specs,
        grids=found.grids,
        manifest={},
    )
    with torch.no_grad():  # what lies on disk is what was scored
        logits = load_classifier(tmp_path / "out")(pixel_values=TEST[0][:100]).logits
    assert torch.equal(logits, class_logits(found.stream, TEST[0][:100], found.variant))
    assert torch.equal(logits.argmax(-1) == TEST[1][:100], ours.right[:100])


def test_four_bits_of_our_recipe_beat_plain_rounding(folder: Path, stream: BlockStream, tmp_path: Path) -> None:
    """And of the activation grids it is those of channels that outliers behind the norms call for."""
    _, plain = scored(stream, quantize(folder, tmp_path, (4,), (4,), NEAREST, Means.NONE, Behind.WEIGHTS))
    _, clipped = scored(
        stream,
        quantize(folder, tmp_path / "a", (4,), (4,), NEAREST, Means.CHANNELS | Means.CLIPPED, Behind.WEIGHTS),
    )
    original, ours = scored(stream, quantize(folder, tmp_path / "b", (4,), (4,)))
    assert float(clipped.kl_nats.mean()) < 0.1 * float(plain.kl_nats.mean())
    assert float(ours.kl_nats.mean()) < 0.8 * float(clipped.kl_nats.mean())
    assert ours.top1 > plain.top1
    assert original.top1 - ours.top1 < 0.05


def test_weights_alone_are_rounded_better_than_to_nearest(folder: Path, stream: BlockStream, tmp_path: Path) -> None:
    """Fails if GPTQ and what refines it are swapped for rounding."""
    kl = [
        float(scored(stream, quantize(folder, tmp_path, (3,), (), recipe))[1].kl_nats.mean())
        for recipe in (NEAREST, DEFAULT)
    ]
    assert kl[1] < 0.6 * kl[0]


def test_mixed_widths_stay_within_the_uniform_size(folder: Path, stream: BlockStream, tmp_path: Path) -> None:
    mixed = quantize(folder, tmp_path, (2, 3, 4), ())
    uniform = quantize(folder, tmp_path, (3,), ())
    assert mixed.plan.average_bits <= uniform_bits(stream.specs, 3) == pytest.approx(uniform.plan.average_bits)
    assert len({choice.bits for choice in mixed.plan.choices.values() if choice is not None}) > 1
    kl = [float(scored(stream, found)[1].kl_nats.mean()) for found in (mixed, uniform)]
    assert kl[0] < kl[1]


def test_places_that_are_said_to_cost_more_do(stream: BlockStream, tmp_path: Path) -> None:
    """Predicted costs against the KL divergence of each place of the last block alone at three bits. Points of
    attention and sites are on one scale; that of directional costs is the divergence's own."""
    walk = SharedWalk(Workbench(stream.source, CALIBRATION, TERMS), asked_of([DEFAULT], [4.0]))
    found = calibrate(stream, CALIBRATION, widths=[3, 8], token_weights=walk.squares)
    grids_at_3 = {key: {3: place.candidates[3].original_grid} for key, place in found.places.items() if key[0] == 1}
    directional = responses(stream, CALIBRATION, grids_at_3, {}, seed=0).costs().places
    num_tokens = found.places[1, "o"].num_values // found.places[1, "o"].row
    predicted, measured = [], []
    for key, place in found.places.items():
        if key[0] == 0:
            continue
        widths = found.uniform(8) | {key: 3}
        folded = tmp_path / key[1]
        write_folded(stream.source, folded, fold_plan(stream, found.foldings(widths)), dtype=torch.float32)
        other, grids = BlockStream(open_source(folded), dtype=torch.float32), found.grids(widths)
        variant = QuantizedClassifier(stream=other, grids=grids, codes={}, plan=None, widths=widths)
        measured.append(float(scored(stream, variant)[1].kl_nats.mean()))
        predicted.append(place.candidates[3].cost)
    whole = [directional[1, name, 3] for block, name in found.places if block == 1]
    assert correlation(predicted, measured) > 0.6
    assert correlation(whole, measured) > 0.8
    assert num_tokens * sum(predicted) < 0.2 * sum(measured)
    assert 0.5 < sum(whole) / sum(measured) < 1.5


def correlation(left: list[float], right: list[float]) -> float:
    """Of ranks."""
    ranks = torch.stack([torch.tensor(x).argsort().argsort().double() for x in (left, right)])
    return float(torch.corrcoef(ranks)[0, 1])


def test_bit_operations_are_spent_better_than_evenly(folder: Path, stream: BlockStream, tmp_path: Path) -> None:
    """One program for all widths takes no more bit operations than four bits everywhere, and loses less."""
    found = calibrate(stream, CALIBRATION, widths=[4], means=Means.NONE)
    kl, spent = [], []
    for name, widths in (("mixed", (3, 4, 5)), ("even", (4,))):
        made = quantize(folder, tmp_path / name, widths, widths, budget=WidthBudget.OPERATIONS)
        assert made.plan is not None
        chosen = {name: choice.bits for name, choice in made.plan.choices.items() if choice is not None}
        spent.append(operations(found, stream.specs, made.widths, chosen))
        kl.append(float(scored(stream, made)[1].kl_nats.mean()))
        assert {(block, at): grid.bits for block, g in enumerate(made.grids) for at, grid in g.items()} == made.widths
        if name == "mixed":
            assert len(set(chosen.values())) > 1
            assert len(set(made.widths.values())) > 1
    assert kl[0] < 0.9 * kl[1]
    assert 0.95 * spent[1] < spent[0] <= spent[1]


def test_bits_of_weights_and_activations_are_spent_better_than_evenly(
    folder: Path, stream: BlockStream, tmp_path: Path
) -> None:
    """One program for all widths takes no more bits an image than four bits everywhere, and loses less."""
    places = calibrate(stream, CALIBRATION, widths=[4], means=Means.NONE).places
    kl, spent = [], []
    for name, widths in (("mixed", (3, 4, 5)), ("even", (4,))):
        made = quantize(folder, tmp_path / name, widths, widths, budget=WidthBudget.BITS)
        assert made.plan is not None
        activations = sum(width * places[key].num_values for key, width in made.widths.items())
        spent.append(made.plan.storage_bits + activations)
        kl.append(float(scored(stream, made)[1].kl_nats.mean()))
    assert kl[0] < 0.9 * kl[1]
    assert 0.99 * spent[1] < spent[0] <= spent[1]


def test_a_ranking_is_not_given_a_budget_of_operations(folder: Path, tmp_path: Path) -> None:
    ranked = replace(DEFAULT, allocation="relevance-magnitude")
    with pytest.raises(ConfigError, match=r"operations is allocated by costs, not by 'relevance-magnitude'"):
        quantize(folder, tmp_path, (3, 4, 5), (4,), ranked, budget=WidthBudget.OPERATIONS)
    with pytest.raises(ConfigError, match="give widths for both"):
        quantize(folder, tmp_path, (3, 4, 5), (), budget=WidthBudget.OPERATIONS)


def test_contribution_scores_choose_all_widths_within_both_averages(
    folder: Path, stream: BlockStream, tmp_path: Path
) -> None:
    """LRP-QViT's MP4: weights and activations of 3 to 5 bits, the layers of most relevance at the widest."""
    made = quantize(folder, tmp_path, (3, 4, 5), (3, 4, 5), budget=WidthBudget.CONTRIBUTION)
    assert made.plan is not None
    assert made.plan.average_bits <= uniform_bits(stream.specs, 4)
    asked = asked_of([replace(DEFAULT, allocation=MEASURE)], [4.0])
    scores = contributions(SharedWalk(Workbench(stream.source, CALIBRATION, TERMS), asked).evidence)
    assert sum(scores.values()) == pytest.approx(1)
    bits = {name: choice.bits for name, choice in made.plan.choices.items() if choice is not None}
    density = {spec.name: scores[spec.name] / spec.num_weights for spec in stream.specs}
    ranked = sorted(density, key=lambda name: -density[name])
    assert bits[ranked[0]] == 5
    assert bits[ranked[-1]] == 3
    places = calibrate(stream, CALIBRATION, widths=[4], means=Means.NONE).places
    total = sum(place.num_values for place in places.values())
    assert 3.5 * total < sum(width * places[key].num_values for key, width in made.widths.items()) <= 4 * total
    assert set(made.widths.values()) == {3, 4, 5} or set(made.widths.values()) == {3, 5}
    for block in range(
        stream.num_blocks
    ):  # both factors of pattern times values are as relevant, the pattern is larger
        assert made.widths[block, "value"] >= made.widths[block, "pattern"]
    with pytest.raises(ConfigError, match="choose the widths of activations too"):
        quantize(folder, tmp_path / "weights", (3, 4, 5), (), budget=WidthBudget.CONTRIBUTION)


def test_mixed_activations_average_to_the_width(folder: Path, stream: BlockStream, tmp_path: Path) -> None:
    mixed = quantize(folder, tmp_path, (8,), (3, 4, 5))
    assert {grid.bits for grids in mixed.grids for grid in grids.values()} == {3, 4, 5}
    assert {
        (block, place): grid.bits for block, g in enumerate(mixed.grids) for place, grid in g.items()
    } == mixed.widths
    original, ours = scored(stream, mixed)
    assert original.top1 - ours.top1 < 0.02
    places = calibrate(stream, CALIBRATION, widths=[4]).places
    total = sum(place.num_values for place in places.values())
    assert sum(bits * places[key].num_values for key, bits in mixed.widths.items()) <= 4 * total
    with pytest.raises(ConfigError, match=r"4, 8 bits have no middle"):
        quantize(folder, tmp_path / "even", (8,), (4, 8))


@torch.no_grad()
def test_refinement_sees_the_inputs_that_layers_multiply(stream: BlockStream) -> None:
    """C and D behind quantized activations, against sums over what hooks see; weights still the original's."""
    calibration = calibrate(stream, CALIBRATION, widths=[4], means=Means.ALL & ~Means.CHANNELS)
    grids = calibration.grids(calibration.uniform(4))
    sweep = RefineSweep(
        stream,
        {0: CALIBRATION[:40], 1: CALIBRATION[40:]},
        num_shards=2,
        micro_batch=16,
        with_shift=True,
        activations=GridActivations(stream=stream, grids=grids),
    )
    sweep.embed()
    hidden = stream.embed(CALIBRATION)
    with stream.block(0) as block:
        specs = stream.sites(0)["up"]
        found = root(sweep.products(0, block, specs, None, {}), 2, merge_products)
        inputs = []
        handle = block.get_submodule("mlp.fc1").register_forward_pre_hook(
            lambda _, a: inputs.append(a[0].flatten(0, 1))
        )
        stream.run(block, 0, hidden)
        with quantized_block(stream, 0, block, grids[0], {}):
            stream.run(block, 0, hidden)
        handle.remove()
    x, xq = inputs[0], quantized(inputs[1], grids[0]["up"])
    assert not torch.allclose(inputs[1], xq)
    torch.testing.assert_close(normalized(found.hessian), xq.T @ xq / len(xq), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.shift, (x - xq).T @ xq, rtol=1e-3, atol=1e-2)


@torch.no_grad()
def test_points_alone_change_nothing(stream: BlockStream) -> None:
    hidden = stream.embed(CALIBRATION[:3])
    with stream.block(1) as block:
        plain = stream.run(block, 1, hidden)
        with with_points(attention_of(stream, block), {}):
            torch.testing.assert_close(stream.run(block, 1, hidden), plain)
        assert torch.equal(stream.run(block, 1, hidden), plain)


def test_places_of_a_block_do_not_depend_on_which_others_are_asked_for(stream: BlockStream) -> None:
    """So that blocks can be shared out over workers."""
    whole = calibrate(stream, CALIBRATION[:16], widths=[4])
    alone = calibrate(stream, CALIBRATION[:16], widths=[4], blocks=[1])
    assert {block for block, _ in alone.places} == {1}
    for key, place in alone.places.items():
        ours, theirs = place.candidates[4], whole.places[key].candidates[4]
        assert ours.cost == theirs.cost
        assert grid_document(ours.grid) == grid_document(theirs.grid), key
