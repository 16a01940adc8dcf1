"""Codebooks of trellis codes: trained on numbers of a normal distribution, and what error they leave.

    python -m benchmarks.trellis_codebooks [--bits 2,3,4,5,6] [--rounds 15] [--write FILE]

Lloyd's algorithm with Viterbi's in place of the nearest value: encode random numbers, put every state's value where the
mean of its numbers lies, and again, from normal quantiles in a random order. Prints the mean squared error times
4^bits, which is 1 at the rate-distortion bound, before and after, on numbers that are in no round; beside it that of
the uniform grid that `lrpq compress` has by default (groups of 64, searched scales of either sign), in bits that count
its scales. ``--write`` makes the file in lrpq/quant that lrpq reads.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.benches import numbers
from lrpq.kernels.trellis import round_segments
from lrpq.model.layers import Choice
from lrpq.quant import trellis
from lrpq.quant.grid import Grid
from lrpq.quant.rtn import round_to_nearest

ROWS, COLUMNS = 2048, 256


def encoded(x: Tensor, book: Tensor, bits: int) -> Tensor:
    """States [columns, rows] of numbers [columns, rows], each column by itself."""
    columns, rows = x.shape
    codes = torch.empty(columns, rows, dtype=torch.int8)
    arguments = torch.ones(1, rows), torch.zeros(columns, columns), torch.ones(rows), torch.zeros(columns).long()
    S, R, weights, runs = arguments
    round_segments(x.clone(), x, S, R, weights, runs, book, codes, trellis.segment_edges([rows]), bits=bits)
    return trellis.states(codes.T.contiguous(), bits).T


def trained(bits: int, rounds: int, generator: torch.Generator) -> tuple[Tensor, float, float]:
    """A codebook, and the errors before and after, times 4^bits."""
    number = 1 << trellis.STATE_BITS
    places = (torch.arange(number, dtype=torch.float64) + 0.5) / number
    book = (torch.erfinv(2 * places - 1) * 2**0.5).float()[torch.randperm(number, generator=generator)]
    test = torch.randn(COLUMNS, ROWS, generator=generator)

    def error() -> float:
        return (test - book[encoded(test, book, bits)]).square().mean().item() * 4**bits

    before = error()
    for _ in range(rounds):
        x = torch.randn(COLUMNS, ROWS, generator=generator)
        found = encoded(x, book, bits).reshape(-1).long()
        counts = torch.bincount(found, minlength=number)
        sums = torch.zeros(number, dtype=torch.float64).index_add_(0, found, x.reshape(-1).double())
        book = torch.where(counts > 0, (sums / counts.clamp(min=1)).float(), book)
    book = book.half().float()
    return book, before, error()


def uniform(bits: int, generator: torch.Generator) -> str:
    """The error of the uniform grid, times 4^bits."""
    x = torch.randn(512, 1024, generator=generator)
    found = []
    for scale_bits in (16, 8):
        choice = Choice(bits=bits, group_size=64, scale_bits=scale_bits)
        q = round_to_nearest(x, choice, importance=torch.ones(1024), grid=Grid.SIGNED)
        all_in = bits + scale_bits / 64
        found.append(f"{(q.dequantize() - x).square().mean().item() * 4**all_in:.3f} at {all_in:g} bits")
    return ", ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=numbers, default=trellis.WIDTHS)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    books = {}
    for bits in arguments.bits:
        generator = torch.Generator().manual_seed(bits)
        book, before, after = trained(bits, arguments.rounds, generator)
        books[f"bits_{bits}"] = book.half()
        line = f"{bits} bits: normal quantiles {before:.3f}, trained {after:.3f}; uniform {uniform(bits, generator)}"
        print(line, flush=True)
    if arguments.write:
        save_file(books, arguments.write)


if __name__ == "__main__":
    main()
