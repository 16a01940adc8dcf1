"""The ``compressed-tensors`` description of a mixed-precision model: which module has which bits and groups.

Format ``pack-quantized``, symmetric: a quantized module ``m`` has, instead of ``m.weight``,

    m.weight_packed  int32 [d_out, ceil(d_in * bits / 32)]   codes, without gaps, each row padded to 32 bits
    m.weight_scale   bf16  [d_out, groups]                   or float8 (e4m3), which loading widens to the model's dtype
    m.weight_shape   int64 [2]                               d_out, d_in

Every module is named by an anchored pattern: a catch-all such as ``Linear`` would let the first group of the
configuration win for all. Linear layers that are listed nowhere are an error in vLLM, so what stays dense is
listed too. Of layers with quantized inputs, the group has the width of these too (`lrpq.checkpoint.activations`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lrpq.checkpoint.activations import input_arguments
from lrpq.checkpoint.layout import StoredTensor
from lrpq.checkpoint.modules import WEIGHT
from lrpq.checkpoint.patterns import anchored_patterns, natural_key, patterns
from lrpq.errors import ConfigError
from lrpq.model.layers import Choice, LinearSpec
from lrpq.quant.grid import QuantizedWeight
from lrpq.quant.packing import pack, packed_shape
from lrpq.quant.stored_scales import dtype_of

METHOD = "compressed-tensors"
FORMAT = "pack-quantized"
PACKED, SCALE, SHAPE = "weight_packed", "weight_scale", "weight_shape"
SUPPORTED_BITS = range(2, 9)  # a sign and at least one more bit; the packer's upper limit
STEPS, SYMBOLS = "int", "trellis"
"""What codes are, as a group's ``type``; the second is the trellis format's alone."""


def check_choice(module: str, choice: Choice, d_in: int) -> None:
    """Refuse a choice that the format cannot store.

    Raises:
        ConfigError: bits outside 2..8, a group size that is not positive or that does not divide ``d_in``.
    """
    if choice.bits not in SUPPORTED_BITS:
        raise ConfigError(
            f"module {module}: {choice.bits} bits cannot be packed; expected 2 to 8 "
            "(leave a module out to keep it dense)"
        )
    if choice.group_size != -1 and choice.group_size < 1:
        raise ConfigError(
            f"module {module}: group size {choice.group_size}; expected a positive one, or -1 for channels"
        )
    if not choice.fits(d_in):
        raise ConfigError(
            f"module {module}: group size {choice.group_size} does not divide its {d_in} inputs; "
            "choose one that does, or -1 (one scale a row)"
        )


def refuse_symbols(module: str, choice: Choice, format: str) -> None:
    """Refuse symbols of a trellis, which a format's readers would take for steps of a grid.

    Raises:
        ConfigError: the module is named.
    """
    if choice.trellis:
        raise ConfigError(f"module {module}: {format} has no place for trellis codes; use --format trellis or dense")


def stored_tensors(original: StoredTensor, choice: Choice) -> tuple[StoredTensor, ...]:
    """Names, dtypes and shapes of the tensors that hold a quantized module.

    Raises:
        ConfigError: the format cannot store the choice.
    """
    module = original.name.removesuffix(WEIGHT)
    check_choice(module, choice, original.shape[1])
    refuse_symbols(module, choice, METHOD)
    return packed_parts(original, choice)


def packed_parts(original: StoredTensor, choice: Choice) -> tuple[StoredTensor, ...]:
    """The tensors of `lrpq.quant.packing.pack`, of any choice."""
    module = original.name.removesuffix(WEIGHT)
    d_out, d_in = original.shape
    return (
        StoredTensor(name=f"{module}.{PACKED}", dtype=torch.int32, shape=packed_shape(d_out, d_in, choice)),
        StoredTensor(name=f"{module}.{SCALE}", dtype=dtype_of(choice.scale_bits), shape=(d_out, choice.groups(d_in))),
        StoredTensor(name=f"{module}.{SHAPE}", dtype=torch.int64, shape=(2,)),
    )


def packed_tensors(weight: QuantizedWeight, original: StoredTensor) -> dict[str, Tensor]:
    """Values of ``stored_tensors``."""
    module = original.name.removesuffix(WEIGHT)
    return {f"{module}.{kind}": values for kind, values in pack(weight).items()}


def loaded(weight: QuantizedWeight, original: StoredTensor, dtype: torch.dtype) -> Tensor:
    """Scale times code, both in the model's dtype.

    Raises:
        QuantizationError: a value is beyond float16, where the model is.
    """
    values: Tensor = weight.dequantize(dtype, name=original.name)
    return values


def quantization_config(
    choices: Mapping[str, Choice],
    *,
    specs: Sequence[LinearSpec] = (),
    ignore: Iterable[str] = (),
    input_bits: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Describe the quantized modules for ``config.json``; the same choices give the same text in any order.

    Args:
        choices: module name -> bits and group size, without the modules that stay dense.
        specs: linear layers; those of other names on disk are described by both names, experts by their block's.
        ignore: names of the linear modules that stay dense, the head among them.
        input_bits: module name -> width of its inputs, where the checkpoint has their grid in this format's form.

    Raises:
        ConfigError: no module is quantized, one is both quantized and ignored, or its bits cannot be packed.
    """
    for name, choice in choices.items():
        refuse_symbols(name, choice, METHOD)
    groups = described_groups(choices, specs=specs, ignore=ignore, input_bits=input_bits, format=FORMAT)
    return {"quant_method": METHOD, "format": FORMAT, "quantization_status": "compressed", **groups}


def described_groups(
    choices: Mapping[str, Choice],
    *,
    specs: Sequence[LinearSpec],
    ignore: Iterable[str],
    input_bits: Mapping[str, int] | None = None,
    format: str,
) -> dict[str, Any]:
    """``ignore`` and ``config_groups`` of a ``quantization_config``: which modules have which choice.

    Args:
        choices: see ``quantization_config``.
        specs: the same.
        ignore: the same.
        input_bits: the same.
        format: of the groups.

    Raises:
        ConfigError: see ``quantization_config``.
    """
    ignored = sorted(set(ignore), key=natural_key)
    both = [name for name in ignored if name in choices]
    if both:
        raise ConfigError(f"module {both[0]}: both quantized and ignored; expected one of the two")
    if not choices:
        raise ConfigError("no module is quantized: the checkpoint would equal the original; give at least one choice")
    by_name = {spec.name: spec for spec in specs}
    members: dict[tuple[Choice, int], list[tuple[str, ...]]] = {}
    for name in sorted(choices, key=natural_key):
        check_choice(name, choices[name], d_in=max(choices[name].group_size, 1))  # widths are checked with the shapes
        group = choices[name], (input_bits or {}).get(name, 0)
        members.setdefault(group, []).append(patterns(name, by_name.get(name)))
    return {
        "ignore": ignored,
        "config_groups": {
            f"group_{i}": {
                "format": format,
                "targets": [f"re:{pattern}" for pattern in anchored_patterns(members[choice, bits])],
                "weights": _weights(choice),
                **({"input_activations": input_arguments(bits)} if bits else {}),
            }
            for i, (choice, bits) in enumerate(sorted(members))
        },
    }


def _weights(choice: Choice) -> dict[str, Any]:
    by_channel = choice.group_size == -1
    return {
        "num_bits": choice.bits,
        "type": SYMBOLS if choice.trellis else STEPS,
        "symmetric": True,
        "strategy": "channel" if by_channel else "group",
        "group_size": None if by_channel else choice.group_size,
        "dynamic": False,
        **({"scale_dtype": str(dtype_of(choice.scale_bits))} if choice.scale_bits != 16 else {}),
    }
