"""Symbols of a trellis as they are stored: down the columns, along their streams, so that a state is a window of bits.

A segment's T = rows x bits bits are one number a column, in words of 32 bits from the lowest to the highest, the first
row's symbol in the highest bits. Of row j the state (quant/trellis.py) is

    (number >> (T - (j + 1) bits)) & (2^12 - 1),

where the number is repeated above its highest bit: before the first row comes the last one. Segments lie one after the
other, each in whole words; what a short last segment leaves of its highest word is zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrpq.quant.trellis import SEGMENT_ROWS, STATE_BITS, codebook, values, whole_segments

if TYPE_CHECKING:
    from jaxtyping import Float, Int8, Int32

WORD_BITS = 32
_DECODED_ELEMENTS = 2**22
"""Weights that are decoded at once."""


def num_words(rows: int, bits: int) -> int:
    """Words of a column."""
    whole, rest = divmod(rows, SEGMENT_ROWS)
    return whole * (SEGMENT_ROWS * bits // WORD_BITS) + -(-rest * bits // WORD_BITS)


def pack_streams(codes: Int8[Tensor, "d_out d_in"], bits: int) -> Int32[Tensor, "words=size d_in"]:
    """Symbols less 2^(bits - 1), packed."""
    parts = [_packed(part, bits) for part in _by_length(codes, SEGMENT_ROWS)]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def unpack_streams(words: Int32[Tensor, "words d_in"], bits: int, rows: int) -> Int8[Tensor, "rows=size d_in"]:
    """Inverse of ``pack_streams``."""
    whole = rows // SEGMENT_ROWS
    head = num_words(whole * SEGMENT_ROWS, bits)
    parts = []
    for part, length, count in ((words[:head], SEGMENT_ROWS, whole), (words[head:], rows % SEGMENT_ROWS, 1)):
        if count and length:
            parts.append(_unpacked(part.view(count, -1, words.shape[1]), bits, length))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def decode_streams(
    words: Int32[Tensor, "words d_in"],
    scales: Float[Tensor, "rows groups"],
    bits: int,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "rows d_in"]:
    """Weights, bit for bit as `QuantizedWeight.dequantize` gives them: scale times value in float32, then ``dtype``.

    States are read out of the words, on a GPU in one launch, elsewhere of some segments at a time; memory besides the
    result there: 16 bytes for each of 2^22 weights.
    """
    rows, d_in = len(scales), words.shape[1]
    found = torch.empty(rows, d_in, dtype=dtype, device=words.device)
    book = codebook(bits, words.device)
    whole = rows // SEGMENT_ROWS * SEGMENT_ROWS
    if whole and words.is_cuda:
        from lrpq.kernels.streams_cuda import decode_segments

        decode_segments(words.contiguous(), scales.contiguous(), book, found, bits=bits, rows=SEGMENT_ROWS)
    elif whole:
        _decode_segments(words, scales, book, found[:whole], bits)
    if whole < rows:
        codes = unpack_streams(words[num_words(whole, bits) :], bits, rows - whole)
        _scale(found[whole:], values(codes, bits), scales[whole:])
    return found


def _decode_segments(words: Tensor, scales: Tensor, book: Tensor, out: Tensor, bits: int) -> None:
    """Whole segments, some at a time."""
    (whole, d_in), segment_words = out.shape, num_words(SEGMENT_ROWS, bits)
    for start in range(0, whole, step := whole_segments(_DECODED_ELEMENTS // d_in)):
        stop = min(start + step, whole)
        first, last = start // SEGMENT_ROWS * segment_words, stop // SEGMENT_ROWS * segment_words
        states = _states(words[first:last].view(-1, segment_words, d_in), bits)
        _scale(out[start:stop], book[states], scales[start:stop])


def _scale(out: Tensor, units: Tensor, scales: Tensor) -> None:
    scaled = units.view(len(units), scales.shape[1], -1) * scales.float().unsqueeze(-1)
    out.copy_(scaled.view(out.shape))


def _by_length(codes: Tensor, length: int) -> Iterator[Tensor]:
    """[segments, rows, d_in] of the whole segments and of the rest."""
    whole = len(codes) // length * length
    if whole:
        yield codes[:whole].view(-1, length, codes.shape[1])
    if whole < len(codes):
        yield codes[whole:].unsqueeze(0)


def _places(rows: int, bits: int) -> Iterator[tuple[int, int, int]]:
    """Row, word and bit of every symbol of a segment."""
    for row in range(rows):
        lowest = (rows - row - 1) * bits
        yield row, lowest // WORD_BITS, lowest % WORD_BITS


def _packed(codes: Tensor, bits: int) -> Tensor:
    segments, rows, d_in = codes.shape
    words = torch.zeros(segments, num_words(rows, bits), d_in, dtype=torch.int64, device=codes.device)
    for row, word, bit in _places(rows, bits):
        symbol = codes[:, row].to(torch.int64).add_(1 << (bits - 1)) << bit
        words[:, word] |= symbol & 0xFFFFFFFF
        if bit + bits > WORD_BITS:
            words[:, word + 1] |= symbol >> WORD_BITS
    return words.sub_((words >> (WORD_BITS - 1)) << WORD_BITS).to(torch.int32).view(-1, d_in)


def _unpacked(words: Tensor, bits: int, rows: int) -> Tensor:
    codes = torch.empty(len(words), rows, words.shape[2], dtype=torch.int8, device=words.device)
    for row, word, bit in _places(rows, bits):
        symbol = _unsigned(words[:, word]) >> bit
        if bit + bits > WORD_BITS:
            symbol |= _unsigned(words[:, word + 1]) << (WORD_BITS - bit)
        codes[:, row] = (symbol & ((1 << bits) - 1)).sub_(1 << (bits - 1)).to(torch.int8)
    return codes.view(-1, words.shape[2])


def _states(words: Tensor, bits: int) -> Tensor:
    """States of whole segments, int32 [rows, d_in]; their bits are whole words, so that the number repeats there."""
    wide = _unsigned(words)
    pairs = wide | (torch.cat([wide[:, 1:], wide[:, :1]], 1) << WORD_BITS)
    states = torch.empty(len(words), SEGMENT_ROWS, words.shape[2], dtype=torch.int32, device=words.device)
    for row, word, bit in _places(SEGMENT_ROWS, bits):
        states[:, row] = (pairs[:, word] >> bit) & ((1 << STATE_BITS) - 1)
    return states.view(-1, words.shape[2])


def _unsigned(words: Tensor) -> Tensor:
    return words.to(torch.int64) & 0xFFFFFFFF
