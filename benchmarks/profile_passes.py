"""What profiling a language model takes, in forward passes over its calibration tokens, by operations.

    python -m benchmarks.profile_passes MODEL [--windows 4] [--length 256]

A forward pass is the model's own over the same tokens, head included. Counted are the products inside the model: of the
walk forward, the walk back, which computes every block again, and its backward passes. Apart, in the same unit: sums
over tokens (Hessians, moments of gradients at outputs), which do not get fewer with fewer passes. Tokens are random:
what is counted does not depend on them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM

from benchmarks.plan import counter
from benchmarks.vision_profile import Counted, walk
from lrpq.compare.prepared import asked_of
from lrpq.compare.recipes import DEFAULT
from lrpq.compare.terms import Terms
from lrpq.compare.workbench import Workbench
from lrpq.importance.asked import Asked
from lrpq.model.source import open_source

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

FISHER = Asked(
    weightings=frozenset({"fisher"}), hessians_by=frozenset({"fisher"}), passes=frozenset(), with_outputs=True
)


def measure(folder: Path, tokens: Int[Tensor, "windows length"]) -> dict[str, Counted]:
    """Row -> FLOPs, and as "forward" those of the model's own pass."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with counter() as mode, torch.no_grad():
        model(tokens)
    found = {"forward": Counted(model=sum(mode.counts.values()), apart=0)}
    del model
    bench = Workbench(open_source(folder), tokens, Terms(dtype=torch.float32, micro_batch=len(tokens)))
    blend = asked_of([DEFAULT], [3.25])
    return found | {"blend (the default)": walk(bench, blend), "fisher": walk(bench, FISHER)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    arguments = parser.parse_args()
    vocabulary = open_source(arguments.model).config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (arguments.windows, arguments.length), generator=generator)
    found = measure(arguments.model, tokens)
    forward = found.pop("forward").model
    print("| token weights | forward passes | sums over tokens, apart |\n|---|---|---|")
    for name, counted in found.items():
        print(f"| {name} | {counted.model / forward:.2f} | {counted.apart / forward:.2f} |")


if __name__ == "__main__":
    main()
