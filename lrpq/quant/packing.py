"""The packed form of codes in a checkpoint and its exact size: steps of a grid as compressed-tensors'
``pack-quantized`` has them, along the rows; symbols of a trellis down the columns (quant/packed_streams.py)."""

from __future__ import annotations

import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32
from torch import Tensor

from lrpq.errors import CheckpointError, QuantizationError
from lrpq.model.layers import Choice
from lrpq.quant.grid import QuantizedWeight, code_range
from lrpq.quant.packed_streams import num_words, pack_streams, unpack_streams
from lrpq.quant.stored_scales import dtype_of

_WORD_BITS = 32


def pack(quantized: QuantizedWeight) -> dict[str, Tensor]:
    """Tensors of one layer as the checkpoint names them.

    ``weight_packed`` int32 [d_out, ceil(d_in bits / 32)]: rows are packed densely, code 0 in the lowest bits,
    each code stored with an offset of 2^(bits-1), or of a trellis [words, d_in], streams down the columns;
    ``weight_scale`` bfloat16 or float8 [d_out, groups]; ``weight_shape`` int64 [2].

    Raises QuantizationError for an asymmetric grid, which transformers cannot load, and for scales that are no numbers
    of the type that they are to be stored as.
    """
    code_range(quantized.choice.bits)
    scales = quantized.scales.contiguous()
    if quantized.choice.scale_bits != 16:
        scales = scales.to(dtype_of(quantized.choice.scale_bits))
        if not torch.equal(scales.to(quantized.scales.dtype), quantized.scales):
            raise QuantizationError(f"scales of a {quantized.choice} layer are no {scales.dtype} numbers; round them")
    if quantized.zero_points is not None:
        raise QuantizationError("zero points cannot be packed: transformers does not load them; use a symmetric grid")
    bits = quantized.choice.bits
    stream = quantized.choice.trellis
    return {
        "weight_packed": pack_streams(quantized.codes, bits) if stream else pack_to_int32(quantized.codes, bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor(quantized.codes.shape, dtype=torch.int64),
    }


def unpack(tensors: dict[str, Tensor], choice: Choice) -> QuantizedWeight:
    """Inverse of ``pack``. Raises CheckpointError where the tensors' shapes do not belong to the choice."""
    d_out, d_in = (int(n) for n in tensors["weight_shape"])
    packed, scales = tensors["weight_packed"], tensors["weight_scale"]
    expected = packed_shape(d_out, d_in, choice), (d_out, choice.groups(d_in))
    if (tuple(packed.shape), tuple(scales.shape)) != expected:
        raise CheckpointError(
            f"packed weight {tuple(packed.shape)} with scales {tuple(scales.shape)} is no {choice} layer of"
            f" {d_out} x {d_in}: expected {expected[0]} and {expected[1]}"
        )
    if (scales.dtype == dtype_of(8)) != (choice.scale_bits == 8):
        raise CheckpointError(f"scales are {scales.dtype}, those of a {choice} layer {dtype_of(choice.scale_bits)}")
    if choice.trellis:
        codes = unpack_streams(packed, choice.bits, d_out)
    else:
        codes = unpack_from_int32(packed, choice.bits, torch.Size((d_out, d_in)))
    scales = scales.bfloat16() if choice.scale_bits == 8 else scales
    return QuantizedWeight(codes=codes.contiguous(), scales=scales, choice=choice)


def storage_bits(d_out: int, d_in: int, choice: Choice) -> int:
    """Bits of ``weight_packed`` and ``weight_scale`` in the file: rows, of a trellis the columns of a segment, are
    padded to whole 32-bit words."""
    first, second = packed_shape(d_out, d_in, choice)
    return first * second * _WORD_BITS + d_out * choice.groups(d_in) * choice.scale_bits


def packed_shape(d_out: int, d_in: int, choice: Choice) -> tuple[int, int]:
    """Of ``weight_packed``."""
    return (num_words(d_out, choice.bits), d_in) if choice.trellis else (d_out, _words(d_in, choice.bits))


def _words(d_in: int, bits: int) -> int:
    return -(-d_in * bits // _WORD_BITS)
