"""Which patches speak for the class: images beside the relevance of their patches, as one PNG.

    python -m benchmarks.vision_heat MODEL --data FOLDER --output FILE.png [--count 8] [--pass lrp]

The logit of the likeliest class is explained (lrpq/relevance/patches.py). Red speaks for it, blue against it; each map
has its own scale. Below it: the class, its logit and the share of the relevance that the patches hold, special tokens
and biases having the rest.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import torch

from benchmarks.vision_images import load_images, normalize
from lrpq.model.source import open_source
from lrpq.model.streaming import BlockStream
from lrpq.relevance.patches import patch_relevance
from lrpq.relevance.rules import Pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--count", type=int, default=8, help="first images of the test set")
    parser.add_argument("--pass", dest="running", type=Pass, default=Pass.LRP, help="lrp, cp-lrp or fisher")
    arguments = parser.parse_args()
    matplotlib.use("Agg")
    from matplotlib import pyplot

    test = load_images(arguments.data / "test.npz", first=arguments.count)
    stream = BlockStream(open_source(arguments.model), dtype=torch.float32)
    found = patch_relevance(stream, normalize(test.pixels), running=arguments.running)
    figure, axes = pyplot.subplots(2, arguments.count, figsize=(1.6 * arguments.count, 3.8), squeeze=False)
    for i, (pixels, patches) in enumerate(zip(test.pixels, found.patches, strict=True)):
        largest = float(patches.abs().max())
        axes[0, i].imshow(pixels.permute(1, 2, 0))
        axes[0, i].set_title(test.classes[int(test.labels[i])], fontsize=8)
        axes[1, i].imshow(patches, cmap="bwr", vmin=-largest, vmax=largest)
        share = float(patches.sum() / found.logits[i])
        label = f"{test.classes[int(found.classes[i])]} {float(found.logits[i]):.1f}\npatches {100 * share:.0f}%"
        axes[1, i].set_xlabel(label, fontsize=8)
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
    figure.tight_layout()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.output, dpi=120)
    print(f"{arguments.output}: {arguments.count} images, pass {arguments.running.value}")


if __name__ == "__main__":
    main()
