"""Top-1 of an image classifier with quantized weights and activations, beside the original's.

    python -m benchmarks.vision MODEL --data FOLDER [--columns W8A8 W6A6 W4A4] [--rows lrpq ..] [--seeds 0 1 2 3 4]

``MODEL`` is what benchmarks/vision_train.py saved, ``FOLDER`` holds its train.npz and test.npz. Calibrated on images
drawn from the training set, another draw for every seed; scored on the test images. A column WbAa has weights of b and
activations of a bits, Wb weights alone. MPa chooses a - 1, a or a + 1 bits for the weights of each layer and for the
activations of each place, both no larger on average than a; WPa does so for weights alone, its activations have a bits.
Patch embedding and classifier are not quantized. Rows differ in one thing from the one above them:

    plain       one uniform grid a tensor over the whole range; weights rounded to nearest, searched scales
    channels    and a grid a channel behind LayerNorm, folded (RepQ-ViT, LRP-QViT)
    clipped     and ranges by the squared error of the activation (as the papers have it, tighter ranges too)
    judged      instead by the error of the next product, tokens weighted by relevance
    nearest     and shifted and logarithmic grids: all of ours, weights still rounded to nearest
    gptq        weights by uniform GPTQ, sequential, activation order: the control
    weights     weights by lrpq's whole recipe; MP by its curvature costs
    lrpq        and rounded behind quantized activations, whose errors the correction makes up for; MP of all widths in
                one program by directional costs, with bits of weights and activations as the budget
    score       apart, but MP of the weights by a ranking of relevance (LRP-QViT's contribution score) on two widths
    program     lrpq, but MP by LRP-QViT's integer program on contribution scores, of weights and activations
    paper       LRP-QViT whole: clipped channels, logarithmic softmax, nearest rounding, MP by its integer program
    averages    apart, but by directional costs
    apart       lrpq, but MP of weights and of activations each for itself, by costs of single outputs and tokens
    operations  lrpq, but MP with bit operations as the budget
    rebuilt     lrpq, and each block's codes, scales and activation steps learnt on the error of its outputs

The tables are those of benchmarks/vision_table.py; the seconds are those of quantizing, scoring is not in them.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.vision_images import Images, load_images, normalize
from benchmarks.vision_table import gathered, report
from lrpq.activations.calibrate import Means
from lrpq.compare.recipes import CONTROL, DEFAULT, Recipe, Rounding
from lrpq.compare.terms import Terms
from lrpq.compare.vision import Behind, quantize_classifier
from lrpq.compare.vision_widths import WidthBudget
from lrpq.evaluate.classification import score_images
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.source import open_source
from lrpq.model.streaming import BlockStream
from lrpq.tune.options import Reconstruction

NEAREST = replace(CONTROL, rounding=Rounding.NEAREST)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """How a classifier is quantized."""

    means: Means = Means.ALL
    recipe: Recipe = DEFAULT
    behind: Behind = Behind.ACTIVATIONS
    budget: WidthBudget = WidthBudget.BITS
    reconstruct: Reconstruction | None = None


def rounded_to_nearest(means: Means) -> Row:
    return Row(means=means, recipe=NEAREST, behind=Behind.WEIGHTS)


ROWS: Mapping[str, Row] = {
    "plain": rounded_to_nearest(Means.NONE),
    "channels": rounded_to_nearest(Means.CHANNELS),
    "clipped": rounded_to_nearest(Means.CLIPPED | Means.CHANNELS),
    "judged": rounded_to_nearest(Means.CLIPPED | Means.CHANNELS | Means.JUDGED_BY_OUTPUT),
    "nearest": rounded_to_nearest(Means.ALL),
    "gptq": Row(recipe=CONTROL, behind=Behind.WEIGHTS),
    "weights": Row(behind=Behind.WEIGHTS, budget=WidthBudget.APART),
    "lrpq": Row(),
    "score": Row(recipe=replace(DEFAULT, allocation="relevance-magnitude"), budget=WidthBudget.APART),
    "program": Row(budget=WidthBudget.CONTRIBUTION),
    "paper": Row(
        means=Means.CLIPPED | Means.CHANNELS | Means.LOGARITHMIC,
        recipe=NEAREST,
        behind=Behind.WEIGHTS,
        budget=WidthBudget.CONTRIBUTION,
    ),
    "averages": Row(budget=WidthBudget.AVERAGES),
    "apart": Row(budget=WidthBudget.APART),
    "operations": Row(budget=WidthBudget.OPERATIONS),
    "rebuilt": Row(reconstruct=Reconstruction()),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """Widths."""

    weight_bits: tuple[int, ...]
    average_bits: int
    activation_bits: tuple[int, ...]


def column(text: str) -> Column:
    fixed, mixed = re.fullmatch(r"W(\d)(?:A(\d))?", text), re.fullmatch(r"(MP|WP)(\d)", text)
    if fixed:
        bits, activations = int(fixed[1]), (int(fixed[2]),) if fixed[2] else ()
        return Column(weight_bits=(bits,), average_bits=bits, activation_bits=activations)
    if mixed:
        bits = int(mixed[2])
        three = (bits - 1, bits, bits + 1)
        return Column(weight_bits=three, average_bits=bits, activation_bits=three if mixed[1] == "MP" else (bits,))
    raise argparse.ArgumentTypeError(f"{text!r}: expected W4A4, W4, WP4 or MP4, for example")


def draw(images: Images, count: int, seed: int) -> torch.Tensor:
    chosen = torch.randperm(len(images.labels), generator=torch.Generator().manual_seed(seed))[:count]
    return normalize(images.pixels[chosen])


def measure(
    source: ModelSource, row: str, widths: Column, calibration: torch.Tensor, test: Images, seed: int, device: str
) -> dict[str, float]:
    how = ROWS[row]
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lrpq-folded-") as scratch:
        found = quantize_classifier(
            source,
            calibration,
            weight_bits=widths.weight_bits,
            average_bits=widths.average_bits,
            activation_bits=widths.activation_bits,
            recipe=how.recipe,
            folded=Path(scratch) / "model",
            means=how.means,
            behind=how.behind,
            budget=how.budget,
            reconstruct=how.reconstruct,
            terms=Terms(dtype=torch.float32, micro_batch=32, seed=seed, device=device),
        )
        seconds = time.monotonic() - started
        original = BlockStream(source, dtype=torch.float32, device=device)
        x = normalize(test.pixels)
        scores = score_images(original, x, test.labels, {row: (found.stream, found.variant)})
    ours, reference = scores[row], scores["reference"]
    return {
        "top1": ours.top1,
        "original_top1": reference.top1,
        "agreement": float(ours.agrees.double().mean()),
        "kl_nats": float(ours.kl_nats.mean()),
        "all_in_bits": found.plan.average_bits if found.plan is not None else 32.0,
        "seconds": seconds,
        "rebuilt_blocks": sum(outcome.accepted for outcome in found.rebuilt),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument(
        "--rows", nargs="+", choices=list(ROWS), default=["plain", "nearest", "gptq", "weights", "lrpq"]
    )
    parser.add_argument("--columns", nargs="+", default=["W8A8", "W6A6", "W4A4"])
    parser.add_argument("--images", type=int, default=128, help="to calibrate on")
    parser.add_argument("--test-images", type=int, help="of the test set at most")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    columns = {text: column(text) for text in arguments.columns}
    source = open_source(arguments.model)
    images = load_images(arguments.data / "train.npz")
    test = load_images(arguments.data / "test.npz", first=arguments.test_images)
    results: list[dict[str, object]] = []
    for text, widths in columns.items():
        for row in arguments.rows:
            for seed in arguments.seeds:
                found = measure(source, row, widths, draw(images, arguments.images, seed), test, seed, arguments.device)
                results.append({"row": row, "column": text, "seed": seed, **found})
                print(json.dumps(results[-1]), flush=True)
                if arguments.json:
                    arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"\n{len(test.labels):,} test images, {arguments.images} to calibrate on", end="")
    report(gathered(results), "lrpq")


if __name__ == "__main__":
    main()
