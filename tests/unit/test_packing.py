"""Packed codes are those of compressed-tensors, bit for bit, and their size is known beforehand."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load, save

from lrpq.errors import CheckpointError, QuantizationError
from lrpq.model.layers import Choice
from lrpq.quant.grid import Grid, QuantizedWeight, code_range
from lrpq.quant.packing import pack, storage_bits, unpack
from lrpq.quant.rtn import round_to_nearest

BITS = [2, 3, 4, 5, 6, 8]


def random_codes(bits: int, d_out: int, d_in: int, group_size: int = -1) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(bits * 1000 + d_in)
    low, high = code_range(bits)
    choice = Choice(bits=bits, group_size=group_size)
    return QuantizedWeight(
        codes=torch.randint(low, high + 1, (d_out, d_in), generator=generator).to(torch.int8),
        scales=torch.rand(d_out, choice.groups(d_in), generator=generator).add(0.1).bfloat16(),
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
