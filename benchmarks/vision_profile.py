"""What profiling an image classifier takes, in forward passes over its calibration images, by operations.

    python -m benchmarks.vision_profile [--models vit-tiny deit-tiny swin-tiny] [--images 32]

The models of benchmarks/vision_train.py with random weights: what is counted does not depend on them. A forward pass is
the model's own over the same images. Counted are the products inside the model: of the walk (forward, recomputed
forward, a backward pass for each kind of gradient) and, with activations, of the forward walk in which their grids are
searched. Apart, in the same unit: sums over tokens (Hessians, moments of outputs), which every calibrated quantizer
takes, and the products that grids are judged by, on at most 2,048 tokens a site and 16 images a point of attention,
however many images there are. ``two walks`` is what was done before they shared one: squared gradients for the grids on
the original, the whole profile on the folded model.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from benchmarks.plan import counter
from benchmarks.vision_train import MODELS, SIZE
from lrpq.activations.calibrate import calibrate
from lrpq.compare.prepared import asked_of
from lrpq.compare.recipes import DEFAULT
from lrpq.compare.shared_walk import SharedWalk
from lrpq.compare.terms import Terms
from lrpq.compare.workbench import Workbench
from lrpq.importance.asked import Asked
from lrpq.model.source import open_source
from lrpq.model.streaming import BlockStream

SUMS = "aten.addmm_"
"""In place: of no model, of all sums over tokens."""
SQUARES_ALONE = Asked(weightings=frozenset({"fisher"}), hessians_by=frozenset(), passes=frozenset(), with_outputs=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """FLOPs."""

    model: int
    apart: int

    def __add__(self, other: Counted) -> Counted:
        return Counted(model=self.model + other.model, apart=self.apart + other.apart)


def split(counts: Mapping[str, int]) -> Counted:
    return Counted(model=sum(n for name, n in counts.items() if name != SUMS), apart=counts.get(SUMS, 0))


class CountedStream(BlockStream):
    """A stream that says what its own forwards take."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.forwards = 0

    def run(self, block: nn.Module, index: int, hidden: Tensor) -> Tensor:
        with counter() as mode:
            out = super().run(block, index, hidden)
        self.forwards += sum(mode.counts.values())
        return out


def walk(bench: Workbench, asked: Asked) -> Counted:
    with counter() as mode:
        for _ in bench.evidence(asked):
            pass
    return split(mode.counts)


def measure(folder: Path, images: Tensor) -> dict[str, tuple[float, float]]:
    """Row -> (passes through the model, apart), in forward passes."""
    source, terms = open_source(folder), Terms(dtype=torch.float32, micro_batch=4)
    model = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with counter() as mode, torch.no_grad():
        for batch in images.split(terms.micro_batch):
            model(pixel_values=batch)
    forward = sum(mode.counts.values())
    bench, asked = Workbench(source, images, terms), asked_of([DEFAULT], [4.0])
    weights = walk(bench, asked)
    with counter() as mode:
        shared = SharedWalk(bench, asked)
    once = split(mode.counts)
    stream = CountedStream(source, dtype=terms.dtype)
    with counter() as mode:
        calibrate(stream, images, widths=[4], token_weights=shared.squares, micro_batch=terms.micro_batch)
    grids = Counted(model=stream.forwards, apart=sum(mode.counts.values()) - stream.forwards)
    rows = {
        "weights alone": weights,
        "weights and activations": once + grids,
        "the same, two walks": walk(bench, SQUARES_ALONE) + grids + weights,
    }
    return {name: (found.model / forward, found.apart / forward) for name, found in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--images", type=int, default=32, help="calibration images")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    images = torch.randn(arguments.images, 3, SIZE, SIZE)
    print(f"in forward passes over {arguments.images} calibration images of {SIZE} x {SIZE}")
    print("| model | what | through the model | apart |\n|---|---|---|---|")
    for name in arguments.models:
        with tempfile.TemporaryDirectory(prefix="lrpq-vision-profile-") as scratch:
            MODELS[name](num_labels=10).eval().save_pretrained(scratch)
            for row, (passes, apart) in measure(Path(scratch), images).items():
                print(f"| {name} | {row} | {passes:.2f} | {apart:.2f} |", flush=True)


if __name__ == "__main__":
    main()
