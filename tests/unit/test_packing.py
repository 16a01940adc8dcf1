"""Packed steps of a grid are those of compressed-tensors, bit for bit, symbols of a trellis lie down the columns; their
size is known beforehand."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load, save

from lrpq.errors import CheckpointError, QuantizationError
from lrpq.model.layers import Choice
from lrpq.quant import packed_streams
from lrpq.quant.grid import Grid, QuantizedWeight, code_range
from lrpq.quant.packed_streams import decode_streams
from lrpq.quant.packing import pack, storage_bits, unpack
from lrpq.quant.rtn import round_to_nearest
from lrpq.quant.trellis import SEGMENT_ROWS, STATE_BITS, WIDTHS, codebook

BITS = [2, 3, 4, 5, 6, 8]
ROWS = [16, 31, 64, 127, 128, 144, 256, 301]
"""Of streams: short and whole segments, and both."""


def random_codes(bits: int, d_out: int, d_in: int, group_size: int = -1, **options: Any) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(bits * 1000 + d_in)
    low, high = code_range(bits)
    choice = Choice(bits=bits, group_size=group_size, **options)
    scales = torch.rand(d_out, choice.groups(d_in), generator=generator).add(0.1)
    return QuantizedWeight(
        codes=torch.randint(low, high + 1, (d_out, d_in), generator=generator).to(torch.int8),
        scales=(scales.to(torch.float8_e4m3fn) if choice.scale_bits == 8 else scales).bfloat16(),
        choice=choice,
    )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("d_in", [1, 7, 31, 32, 33, 50, 64, 577])
def test_round_trip_and_layout(bits: int, d_in: int) -> None:
    quantized = random_codes(bits, 3, d_in)
    tensors = pack(quantized)
    back = unpack(tensors, quantized.choice)
    assert torch.equal(back.codes, quantized.codes)
    assert torch.equal(back.scales, quantized.scales)
    assert back.choice == quantized.choice

    # the layout, by hand: code j + 2^(bits-1) occupies bits [j bits, (j + 1) bits) of the row
    offset = 2 ** (bits - 1)
    for row, words in zip(quantized.codes.tolist(), tensors["weight_packed"].tolist(), strict=True):
        number = sum((code + offset) << (j * bits) for j, code in enumerate(row))
        expected = [(number >> (32 * i)) & 0xFFFFFFFF for i in range(-(-d_in * bits // 32))]
        assert [word & 0xFFFFFFFF for word in words] == expected


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [64, -1])
def test_compressed_tensors_reads_our_codes(bits: int, group_size: int) -> None:
    quantized = random_codes(bits, 5, 192, group_size)
    strategy = {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=True, dynamic=False, **strategy)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    loaded = PackedQuantizationCompressor.decompress(pack(quantized), scheme)
    assert torch.equal(loaded["weight"], quantized.dequantize(torch.bfloat16))


@pytest.mark.parametrize("bits", BITS)
def test_compressed_tensors_reads_negative_scales(bits: int) -> None:
    W = torch.randn(5, 128, generator=torch.Generator().manual_seed(3))
    choice = Choice(bits=bits, group_size=64)
    quantized = round_to_nearest(W, choice, importance=torch.ones(128), grid=Grid.SIGNED)
    assert (quantized.scales < 0).any()
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=True, dynamic=False, strategy="group", group_size=64)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    loaded = PackedQuantizationCompressor.decompress(pack(quantized), scheme)
    assert torch.equal(loaded["weight"], quantized.dequantize(torch.bfloat16))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("d_in", "group_size"), [(1, -1), (33, -1), (64, 64), (96, 32), (577, -1)])
def test_storage_bits_is_the_size_in_the_file(bits: int, d_in: int, group_size: int) -> None:
    quantized = random_codes(bits, 5, d_in, group_size)
    in_file = load(save(pack(quantized)))
    stored = sum(in_file[name].numel() * in_file[name].element_size() for name in ("weight_packed", "weight_scale"))
    assert storage_bits(5, d_in, quantized.choice) == 8 * stored


def test_what_does_not_belong_together_is_refused() -> None:
    tensors = pack(random_codes(4, 3, 64, 32))
    with pytest.raises(CheckpointError, match="3b/g32"):
        unpack(tensors, Choice(bits=3, group_size=32))
    with pytest.raises(CheckpointError, match="4b/g64"):
        unpack(tensors, Choice(bits=4, group_size=64))
    asymmetric = round_to_nearest(torch.rand(4, 64), Choice(bits=4, group_size=64), grid=Grid.ASYMMETRIC)
    with pytest.raises(QuantizationError, match="zero points"):
        pack(asymmetric)


def streams_by_hand(packed: torch.Tensor, bits: int, rows: int) -> Iterator[tuple[int, int, list[int]]]:
    """First row, rows and, for every column, the number that a segment's words make up."""
    words, first = packed.tolist(), 0
    while first < rows:
        length = min(SEGMENT_ROWS, rows - first)
        taken, words = words[: -(-length * bits // 32)], words[-(-length * bits // 32) :]
        unsigned = [[word & 0xFFFFFFFF for word in row] for row in taken]
        yield (
            first,
            length,
            [sum(w << (32 * i) for i, w in enumerate(column)) for column in zip(*unsigned, strict=True)],
        )
        first += length
    assert not words


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
def test_streams_lie_down_the_columns_the_first_row_highest(bits: int, rows: int) -> None:
    quantized = random_codes(bits, rows, 3, trellis=True)
    tensors = pack(quantized)
    offset = 2 ** (bits - 1)
    for first, length, numbers in streams_by_hand(tensors["weight_packed"], bits, rows):
        total = length * bits
        for column, number in enumerate(numbers):
            assert number < 1 << total  # what is left of the highest word is zero
            for row in range(length):
                symbol = (number >> (total - (row + 1) * bits)) & (2**bits - 1)
                assert symbol == int(quantized.codes[first + row, column]) + offset
    back = unpack(tensors, quantized.choice)
    assert back.codes.dtype == torch.int8
    assert torch.equal(back.codes, quantized.codes)
    assert torch.equal(back.scales, quantized.scales)
    assert back.choice == quantized.choice
    assert torch.equal(tensors["weight_shape"], torch.tensor([rows, 3]))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
def test_a_state_is_a_window_of_the_number_that_repeats(bits: int, rows: int) -> None:
    quantized = random_codes(bits, rows, 2, trellis=True)
    packed = pack(quantized)["weight_packed"]
    expected = torch.empty(rows, 2)
    for first, length, numbers in streams_by_hand(packed, bits, rows):
        total = length * bits
        for column, number in enumerate(numbers):
            for row in range(length):
                state = (number | number << total) >> (total - (row + 1) * bits) & (2**STATE_BITS - 1)
                if (row + 1) * bits >= STATE_BITS:
                    assert state == number >> (total - (row + 1) * bits) & (2**STATE_BITS - 1)
                expected[first + row, column] = codebook(bits)[state]
    assert torch.equal(decode_streams(packed, torch.ones(rows, 1), bits), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", WIDTHS)
def test_packed_streams_are_decoded_as_their_codes_are(
    bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, also where segments are decoded one by one."""
    quantized = random_codes(bits, 300, 96, 32, trellis=True)
    packed, expected = pack(quantized)["weight_packed"], quantized.dequantize(dtype)
    for elements in (packed_streams._DECODED_ELEMENTS, 1):
        monkeypatch.setattr(packed_streams, "_DECODED_ELEMENTS", elements)
        assert torch.equal(decode_streams(packed, quantized.scales, bits, dtype), expected)


@pytest.mark.parametrize("bits", WIDTHS)
def test_parts_of_whole_segments_are_packed_one_after_the_other(bits: int) -> None:
    """So parts of a layer that were made in different places are put together."""
    quantized = random_codes(bits, 300, 5, trellis=True)
    parts = [pack(part)["weight_packed"] for part in quantized.split([128, 128, 44])]
    assert torch.equal(torch.cat(parts), pack(quantized)["weight_packed"])


@pytest.mark.parametrize("scale_bits", [8, 16])
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
def test_storage_bits_of_streams_is_the_size_in_the_file(bits: int, rows: int, scale_bits: int) -> None:
    quantized = random_codes(bits, rows, 96, 32, scale_bits=scale_bits, trellis=True)
    in_file = load(save(pack(quantized)))
    stored = sum(in_file[name].numel() * in_file[name].element_size() for name in ("weight_packed", "weight_scale"))
    assert storage_bits(rows, 96, quantized.choice) == 8 * stored
    if rows % 32 == 0:
        assert storage_bits(rows, 96, quantized.choice) == storage_bits(
            rows, 96, replace(quantized.choice, trellis=False)
        )
    assert torch.equal(unpack(in_file, quantized.choice).scales, quantized.scales)


def test_streams_that_do_not_belong_together_are_refused() -> None:
    quantized = random_codes(4, 144, 64, 32, trellis=True)
    tensors, choice = pack(quantized), quantized.choice
    for wrong in (replace(choice, bits=3), replace(choice, group_size=64), replace(choice, trellis=False)):
        with pytest.raises(CheckpointError, match=f"is no {wrong} layer of 144 x 64"):
            unpack(tensors, wrong)
    for name in ("weight_packed", "weight_scale"):
        with pytest.raises(CheckpointError, match=r"is no 4b/g32/trellis layer of 144 x 64: expected \(18, 64\)"):
            unpack(tensors | {name: tensors[name][1:]}, choice)
    with pytest.raises(CheckpointError, match="layer of 272 x 64"):
        unpack(tensors | {"weight_shape": torch.tensor([272, 64])}, choice)
    with pytest.raises(CheckpointError, match=r"scales are torch\.bfloat16, those of a 4b/g32/f8/trellis layer"):
        unpack(tensors, replace(choice, scale_bits=8))
    with pytest.raises(QuantizationError, match=r"scales of a 4b/g32/f8/trellis layer are no torch\.float8_e4m3fn"):
        pack(replace(quantized, choice=replace(choice, scale_bits=8)))
