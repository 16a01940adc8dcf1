"""Trellis codes: ``bits`` a weight, of which every weight reads those of its neighbours too.

Down a column of the weight runs a stream of symbols of ``bits`` bits, one a row. A row's value is looked up by the last
``STATE_BITS`` bits of the stream, its own and those of the rows above, in one codebook of 2^12 values:

    s_j = (s_{j-1} 2^bits + symbol_j) mod 2^12,    q_j = scale_j codebook[s_j].

So a weight may have one of 4,096 values, not of 2^bits, and still costs its ``bits``: what a row may be depends on what
the rows above are, and Viterbi's algorithm finds the stream with the least error of all of a column together. For
numbers of a normal distribution that leaves 1.2 to 1.6 times the least error that any code of so many bits can have
(the rate-distortion bound 4^-bits), where a uniform grid with a scale for 64 weights leaves 2.4 to 3.0
(``python -m benchmarks.trellis_codebooks``). The trellis is QTIP's (Tseng et al. 2024, arXiv:2406.11235, the bitshift
trellis; trellis coded quantization is Marcellin and Fischer 1990, IEEE Trans. Commun. 38:82). There, as in EXL3, it
runs through tiles of 16 x 16, within which errors are not fed back. Here it runs down a column, whose rows do not
interact in GPTQ: the feedback from column to column stays exact.

Rows are cut into segments of 128, each a stream of its own that bites its tail: the first rows read the symbols of the
last ones, so that no bits are spent on a beginning.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load

from lrpq.errors import QuantizationError
from lrpq.model.layers import TRELLIS_WIDTHS, Choice

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Int8, Int32
    from torch import Tensor

STATE_BITS = 12
"""Of the stream, that decide on a value. 10 leave 7 to 43% more error at 2 to 6 bits, and take a quarter of the
time."""
SEGMENT_ROWS = 128
"""Of a stream. Those of one column are found side by side, so that fewer rows would keep a GPU busier; each has its
tail to bite."""
LEAST_ROWS = 16
"""Of a stream: the shorter, the more its tail costs: at 2 bits 1.24, 1.35, 1.96 and 6.3 times the bound with 64, 32, 16
and 8 rows."""
WIDTHS = TRELLIS_WIDTHS
LEFT = {2: 1.19 / 4**2, 3: 1.23 / 4**3, 4: 1.30 / 4**4, 5: 1.42 / 4**5, 6: 1.56 / 4**6}
"""Mean squared error that a codebook leaves of normal numbers of variance 1 (``benchmarks.trellis_codebooks``)."""
SHARES: Mapping[int, Mapping[int, float]] = {
    32: dict.fromkeys(WIDTHS, 0.6),
    64: dict.fromkeys(WIDTHS, 0.5),
    128: dict.fromkeys(WIDTHS, 0.44),
    -1: {2: 0.44, 3: 0.39, 4: 0.33, 5: 0.32, 6: 0.32},
}
"""Group size -> width -> share of the loss. Groups of 64 and whole rows: geometric means over layers of SmolLM2 and
Gemma 3 270M (8 of 10 values between .41 and .66 in groups of 64; docs/log.md). Groups of 32 and 128: of one block of
SmolLM2, in proportion."""
_CODEBOOKS = "trellis_codebooks.safetensors"
_DIGEST = "15601647065d2189ffcbace4676aa5c9190abe39b9cc228867ad6f7558882a63"
"""sha256 of the file: stored codes are symbols of these values, and a digest in the code is part of their keys."""


def check_width(bits: int, *, name: str = "layer") -> None:
    """Raise QuantizationError where no codebook has the width."""
    if bits not in WIDTHS:
        raise QuantizationError(f"{name}: no trellis of {bits} bits: choose from {list(WIDTHS)}")


def share_of_grid(choice: Choice) -> float:
    """Of the loss that uniform codes of the same width and group size leave, about what the choice leaves.

    Raises:
        KeyError: that is not known of its group size and width.
    """
    return SHARES[choice.group_size][choice.bits] if choice.trellis else 1.0


def segment_edges(
    parts: Sequence[int], device: torch.device | str = "cpu", *, name: str = "layer"
) -> Int32[Tensor, "edges=size"]:
    """First rows of the segments of layers that lie one after the other, and the number of all rows, int32.

    Raises:
        QuantizationError: a segment is so short that its history would be its own rows, many times over.
    """
    ends = [0]
    for rows in parts:
        if 0 < (rest := rows % SEGMENT_ROWS) < LEAST_ROWS:
            raise QuantizationError(
                f"{name}: {rows} rows leave a trellis's segment of {rest}, at least {LEAST_ROWS} are needed; use"
                " uniform codes for it"
            )
        start = ends[-1]
        ends += [start + min(first + SEGMENT_ROWS, rows) for first in range(0, rows, SEGMENT_ROWS)]
    return torch.tensor(ends, dtype=torch.int32, device=device)


def whole_segments(rows: int) -> int:
    """About so many rows, at least one segment, that cut none where a layer is taken apart every so many."""
    return max(1, rows // SEGMENT_ROWS) * SEGMENT_ROWS


def check_parts(parts: Sequence[int], *, name: str = "layer") -> None:
    """Raise QuantizationError for parts of a layer that cut a segment."""
    if any(rows % SEGMENT_ROWS for rows in parts[:-1]):
        raise QuantizationError(f"{name}: parts of {list(parts)} rows cut segments of {SEGMENT_ROWS} rows of a trellis")


def check_cut(rows: slice, d_out: int) -> None:
    """Raise QuantizationError for rows that begin or end inside a segment."""
    start, stop, _ = rows.indices(d_out)
    if start % SEGMENT_ROWS or (stop % SEGMENT_ROWS and stop != d_out):
        raise QuantizationError(f"rows {start} to {stop} of {d_out} cut a segment of {SEGMENT_ROWS} rows of a trellis")


def summed(errors: Float[Tensor, "rows=d_out"]) -> Float[Tensor, "rows=d_out"]:
    """The sum over a row's segment, for every row."""
    segment = torch.arange(len(errors), device=errors.device) // SEGMENT_ROWS
    padded = torch.nn.functional.pad(errors, (0, -len(errors) % SEGMENT_ROWS))
    found: Tensor = padded.view(-1, SEGMENT_ROWS).sum(1)[segment]
    return found


def codebook(bits: int, device: torch.device | str = "cpu") -> Float[Tensor, "states=size"]:
    """The values of all states, for weights of variance 1: float32 that float16 holds exactly.

    Raises QuantizationError where no codebook has the width.
    """
    check_width(bits)
    return _on(bits, torch.device(device))


@lru_cache(maxsize=64)
def _on(bits: int, device: torch.device) -> Tensor:
    if device.type == "cpu":
        stored = files("lrpq.quant").joinpath(_CODEBOOKS).read_bytes()
        if hashlib.sha256(stored).hexdigest() != _DIGEST:
            raise QuantizationError(f"{_CODEBOOKS}: is not that of this version of lrpq; install it again")
        books: dict[str, Tensor] = load(stored)
        return books[f"bits_{bits}"].float()
    return _on(bits, torch.device("cpu")).to(device)


def values(codes: Int8[Tensor, "d_out d_in"], bits: int, rows: slice = slice(None)) -> Float[Tensor, "rows d_in"]:
    """Values of some rows in units of their scales, float32.

    Args:
        codes: symbols less 2^(bits - 1), of whole columns: a row's value depends on the rows of its segment above it.
        bits: of a symbol.
        rows: those that are wanted, consecutive.
    """
    found: Tensor = codebook(bits, codes.device)[states(codes, bits, rows)]
    return found


def states(codes: Int8[Tensor, "d_out d_in"], bits: int, rows: slice = slice(None)) -> Int[Tensor, "rows d_in"]:
    """The last ``STATE_BITS`` bits of the streams at some rows, int32."""
    own = torch.arange(len(codes), device=codes.device)[rows]
    first = own // SEGMENT_ROWS * SEGMENT_ROWS
    length = torch.clamp(len(codes) - first, max=SEGMENT_ROWS)
    found: Tensor = torch.zeros(len(own), codes.shape[1], dtype=torch.int32, device=codes.device)
    for back in range(-(-STATE_BITS // bits)):
        above = first + torch.remainder(own - first - back, length)
        found += (codes[above].to(torch.int32) + (1 << (bits - 1))) << (bits * back)
    return found.bitwise_and_((1 << STATE_BITS) - 1)
