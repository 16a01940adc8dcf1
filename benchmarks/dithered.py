"""A model without the lattice that an earlier quantization left in its weights.

    python -m benchmarks.dithered MODEL [--output DIR] [--share .08] [--width 32] [--seed 0]

A model that is dequantized has weights that lie on a few levels in each run of ``--width`` columns. Files of GGUF that
are called Q4_K_M hold most layers whose rows are no multiple of 256 as Q5_0: 32 levels, a scale of either sign for 32
columns. A signed grid of 5 bits for groups of 64 then rounds with six tenths of the error that it has elsewhere, which
flatters uniform groups with exact scales at 5 bits and more and nothing below. Each weight of the layers that lrpq
quantizes gets Gaussian noise of ``--share`` of its run's root mean square, and the lattice is gone: .08 is six tenths
of a step of Q5_0 (a sixteenth of the largest of 32, some 2.1 standard deviations), which fills the cells evenly. The
result is another model, a little worse, whose weights look as a model's do that was never quantized.

Printed for the model and, with ``--output``, for the one that is written: |W - Q|^2 / |W|^2 of rounding to the nearest
with searched scales in bfloat16, groups of 64, by width, geometric means over some layers, and by what factor it falls
from one width to the next. For normal numbers that is 3.8 to 4.0.
"""

from __future__ import annotations

import argparse
import itertools
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from lrpq.errors import ConfigError, LrpqError
from lrpq.model.layers import Choice, LinearSpec
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.source import open_source
from lrpq.model.streaming import BlockStream
from lrpq.quant.grid import Grid
from lrpq.quant.rtn import round_to_nearest

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

WIDTHS = (3, 4, 5, 6)
GROUP = 64
EVERY = 23
"""Of so many layers one is looked at: a number that is prime to the layers of a block."""
ROWS = 192
"""Of such a layer."""


def dithered(
    W: Float[Tensor, "d_out d_in"], *, share: float, width: int, generator: torch.Generator
) -> Float[Tensor, "d_out d_in"]:
    """W with noise of a share of the root mean square of each run of columns, in W's dtype.

    Raises:
        ConfigError: runs do not fill the rows.
    """
    d_out, d_in = W.shape
    if d_in % width:
        raise ConfigError(f"runs of {width} columns do not fill rows of {d_in}; give --width a divisor")
    runs = W.float().view(d_out, -1, width)
    noise = torch.randn(runs.shape, generator=generator) * runs.square().mean(-1, keepdim=True).sqrt()
    return (runs + share * noise).view(d_out, d_in).to(W.dtype)


def write_dithered(source: ModelSource, folder: Path, output: Path, *, share: float, width: int, seed: int) -> None:
    """The model with noise in every layer that lrpq quantizes; what is not weights is copied.

    Raises:
        ConfigError: the output exists, or runs do not fill the rows of a layer.
    """
    if output.exists():
        raise ConfigError(f"{output} exists; give another --output")
    generator = torch.Generator().manual_seed(seed)
    layers = {name for spec in BlockStream(source, dtype=torch.bfloat16).specs for name in spec.stored}
    tensors: dict[str, Tensor] = {}
    for name in source.names():
        tensor = source.read(name)
        if name in layers:
            tensor = dithered(tensor, share=share, width=width, generator=generator)
        tensors[name] = tensor.contiguous()
    output.mkdir(parents=True)
    for file in sorted(folder.iterdir()):
        if file.is_file() and ".safetensors" not in file.name:
            shutil.copy(file, output / file.name)
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})


def errors(weights: Callable[[LinearSpec], Tensor], specs: list[LinearSpec]) -> Iterator[float]:
    """Relative squared error of rounding, by width: geometric means over the layers."""
    for bits in WIDTHS:
        choice = Choice(bits=bits, group_size=GROUP)
        logs = []
        for spec in specs:
            W = weights(spec)[:ROWS].float()
            Q = round_to_nearest(W, choice, grid=Grid.SIGNED, name=spec.name).dequantize()
            logs.append(math.log(float((W - Q).square().sum() / W.square().sum())))
        yield math.exp(sum(logs) / len(logs))


def line(label: str, found: list[float]) -> str:
    """A model's errors and by what factors they fall."""
    falls = " ".join(f"{wide / narrow:.2f}" for wide, narrow in itertools.pairwise(found))
    return f"{label}: {' '.join(f'{error:.2e}' for error in found)}, falling {falls} times"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--share", type=float, default=0.08)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        folders = [arguments.model]
        if arguments.output is not None:
            source = open_source(arguments.model)
            write_dithered(
                source,
                arguments.model,
                arguments.output,
                share=arguments.share,
                width=arguments.width,
                seed=arguments.seed,
            )
            folders.append(arguments.output)
        print(f"|W - Q|^2 / |W|^2 at {', '.join(map(str, WIDTHS))} bits, groups of {GROUP}")
        for folder in folders:
            stream = BlockStream(open_source(folder), dtype=torch.bfloat16)
            specs = [spec for spec in stream.specs[5::EVERY] if spec.d_in % GROUP == 0]
            if not specs:
                raise ConfigError(f"{folder}: no layer looked at has rows of whole groups of {GROUP} columns")
            print(line(str(folder), list(errors(stream.weight, specs))), flush=True)
    except LrpqError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
