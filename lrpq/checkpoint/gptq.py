"""The GPTQ format (AutoGPTQ, GPTQModel and vLLM's kernels), symmetric, without activation order in the file.

A module ``m`` of d_in columns and d_out rows has, instead of ``m.weight``,

    m.qweight  int32 [d_in * bits / 32, d_out]     codes q in [0, 2^bits), down the columns
    m.scales   fp16  [groups, d_out]
    m.qzeros   int32 [groups, d_out * bits / 32]   zero codes, along the rows; each stored less one ("v1")
    m.g_idx    int32 [d_in]                        group of every column

and the weight is scale * (q - zero). Codes are packed without gaps, the first in the lowest bits. Ours are signed:
q is the code + 2^(bits-1), the zero is 2^(bits-1), and a scale may be negative, which no kernel minds. Scales are
bfloat16 and become float16: exact from 2^-17 to 65,504, and refused where it is not.

One choice is the model's, the others are overrides by name (``dynamic``), first match first. GPTQModel matches the
modules of the model, vLLM its fused ones (``qkv_proj``, ``gate_up_proj``, ``experts``): patterns cover both.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32
from torch import Tensor

from lrpq.checkpoint.compressed_tensors import refuse_symbols
from lrpq.checkpoint.layout import StoredTensor
from lrpq.checkpoint.modules import WEIGHT
from lrpq.checkpoint.patterns import anchored_patterns, natural_key, patterns
from lrpq.errors import CheckpointError, ConfigError
from lrpq.model.layers import Choice, LinearSpec
from lrpq.quant.grid import QuantizedWeight

METHOD = "gptq"
QWEIGHT, QZEROS, SCALES, ORDER = "qweight", "qzeros", "scales", "g_idx"
PARTS = (QWEIGHT, QZEROS, SCALES, ORDER)
BITS = (2, 3, 4, 8)
GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)
WORD_BITS = 32
MULTIPLE = 32  # of both widths: 32 codes of any width fill whole words
SKIPPED, CHANGED = "-:", "+:"
FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
FUSED |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}


def stored_tensors(original: StoredTensor, choice: Choice) -> tuple[StoredTensor, ...]:
    """Names, dtypes and shapes of the tensors that hold a quantized module.

    Raises:
        ConfigError: GPTQ kernels have no such width, group size or shape.
    """
    module = original.name.removesuffix(WEIGHT)
    d_out, d_in = original.shape
    if choice.bits not in BITS:
        raise ConfigError(
            f"module {module}: GPTQ kernels have no {choice.bits}-bit weights; "
            f"use --bits {' '.join(map(str, BITS))}, or another --format"
        )
    if choice.scale_bits != 16:
        raise ConfigError(f"module {module}: GPTQ's layout has scales of 16 bits; leave --scales float8 out")
    if choice.group_size not in GROUP_SIZES or not choice.fits(d_in):
        fitting = " ".join("channel" if size == -1 else str(size) for size in GROUP_SIZES if size <= d_in)
        raise ConfigError(
            f"module {module}: GPTQ kernels have no groups of {choice.group_size} for {d_in} inputs; "
            f"use --group-size with one of {fitting} that divides them, or another --format"
        )
    if d_in % MULTIPLE or d_out % MULTIPLE:
        raise ConfigError(
            f"module {module}: is {d_out} x {d_in}; GPTQ packs multiples of {MULTIPLE}; keep it dense or use another "
            "--format"
        )
    refuse_symbols(module, choice, "GPTQ's layout")
    groups = choice.groups(d_in)
    return (
        StoredTensor(name=f"{module}.{QWEIGHT}", dtype=torch.int32, shape=(d_in * choice.bits // WORD_BITS, d_out)),
        StoredTensor(name=f"{module}.{QZEROS}", dtype=torch.int32, shape=(groups, d_out * choice.bits // WORD_BITS)),
        StoredTensor(name=f"{module}.{SCALES}", dtype=torch.float16, shape=(groups, d_out)),
        StoredTensor(name=f"{module}.{ORDER}", dtype=torch.int32, shape=(d_in,)),
    )


def packed_tensors(weight: QuantizedWeight, original: StoredTensor) -> dict[str, Tensor]:
    """Values of ``stored_tensors``.

    Raises:
        CheckpointError: a scale is no float16 number.
    """
    module = original.name.removesuffix(WEIGHT)
    bits = weight.choice.bits
    scales = weight.scales.to(torch.float16)
    inexact = int((scales.float() != weight.scales.float()).sum())
    if inexact:
        raise CheckpointError(
            f"module {module}: {inexact} of {scales.numel()} scales are no float16 numbers (smallest "
            f"{weight.scales.abs().min().item():.3g}, largest {weight.scales.abs().max().item():.3g}); "
            "use another --format"
        )
    return {
        f"{module}.{QWEIGHT}": pack_to_int32(weight.codes, bits).T.contiguous(),
        f"{module}.{QZEROS}": _zeros(weight.choice, *original.shape),
        f"{module}.{SCALES}": scales.T.contiguous(),
        f"{module}.{ORDER}": _order(weight.choice, original.shape[1]),
    }


def unpacked(module: str, parts: Mapping[str, Tensor], choice: Choice) -> QuantizedWeight:
    """Inverse of ``packed_tensors``, from its tensors without the module's name.

    Raises:
        CheckpointError: the shapes are not the choice's, the zeros not symmetric, or the columns reordered.
    """
    d_out, d_in = parts[QWEIGHT].shape[1], parts[ORDER].shape[0]
    original = StoredTensor(name=module + WEIGHT, dtype=torch.float16, shape=(d_out, d_in))
    try:
        expected = {tensor.name.removeprefix(f"{module}."): tensor for tensor in stored_tensors(original, choice)}
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    for part, tensor in expected.items():
        if tuple(parts[part].shape) != tensor.shape or parts[part].dtype != tensor.dtype:
            raise CheckpointError(
                f"module {module}: {part} is {parts[part].dtype} {list(parts[part].shape)}, expected {tensor.dtype} "
                f"{list(tensor.shape)} for {choice}"
            )
    if not torch.equal(parts[QZEROS], _zeros(choice, d_out, d_in)):
        raise CheckpointError(f"module {module}: has zero points, expected the symmetric grid")
    if not torch.equal(parts[ORDER], _order(choice, d_in)):
        raise CheckpointError(f"module {module}: its columns are reordered ({ORDER}), expected groups in order")
    scales = parts[SCALES].T.to(torch.bfloat16)
    if not torch.equal(scales.to(torch.float16), parts[SCALES].T) or not bool(torch.isfinite(scales).all()):
        raise CheckpointError(f"module {module}: a scale is no bfloat16 number, or not finite")
    codes = unpack_from_int32(parts[QWEIGHT].T.contiguous(), choice.bits, torch.Size((d_out, d_in)))
    return QuantizedWeight(codes=codes.contiguous(), scales=scales.contiguous(), choice=choice)


def quantization_config(
    choices: Mapping[str, Choice], *, specs: Sequence[LinearSpec] = (), ignore: Iterable[str] = ()
) -> dict[str, Any]:
    """Describe the quantized modules for ``config.json``: the most frequent choice, and what differs from it.

    Args:
        choices: module name -> bits and group size, without the modules that stay dense.
        specs: linear layers; those of other names on disk are described by both names, experts by their block's.
        ignore: names of the linear modules that stay dense, or patterns of experts that do (``re:^...$``).
    """
    by_name = {spec.name: spec for spec in specs}
    counts = Counter(choices.values())
    base = min(counts, key=lambda choice: (-counts[choice], choice))
    rules: dict[Choice | None, list[tuple[str, ...]]] = {}
    owners: dict[str, set[Choice | None]] = {}
    for name in sorted(choices, key=natural_key):
        rules.setdefault(choices[name], []).append(patterns(name, by_name.get(name)))
        for alias in _names(name, by_name.get(name)):
            owners.setdefault(_fused(alias), set()).add(choices[name])
    literal: list[str] = []
    for name in sorted(ignore, key=natural_key):
        if name.startswith("re:"):
            literal.append(name.removeprefix("re:"))
        else:
            rules.setdefault(None, []).append((re.escape(name),))
            owners.setdefault(_fused(name), set()).add(None)
    for name in sorted(owners, key=natural_key):
        if name and len(owners[name]) == 1:
            rules[next(iter(owners[name]))].append((re.escape(name),))
    dynamic: dict[str, dict[str, int]] = {}
    for pattern in (*literal, *anchored_patterns(rules.pop(None, []))):
        dynamic[SKIPPED + pattern] = {}
    for choice in sorted(choice for choice in rules if choice is not None and choice != base):
        for pattern in anchored_patterns(rules[choice]):
            dynamic[CHANGED + pattern] = {"bits": choice.bits, "group_size": choice.group_size}
    return {
        "quant_method": METHOD,
        "checkpoint_format": METHOD,
        "bits": base.bits,
        "group_size": base.group_size,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
        "dynamic": dynamic,
    }


def stored_choices(config: Mapping[str, Any]) -> list[tuple[str, Choice]]:
    """(pattern, choice) of a ``quantization_config``, first match first; the last one matches every name.

    Raises:
        ValueError, LookupError, TypeError or AttributeError: the configuration is not what we write.
    """
    if config["checkpoint_format"] != METHOD or config["sym"] is not True or config["desc_act"] is not False:
        raise ValueError(f"expected checkpoint_format {METHOD!r}, sym and no desc_act")
    rules = [
        (pattern.removeprefix(CHANGED), _stored_choice({**config, **override}))
        for pattern, override in config["dynamic"].items()
        if not pattern.startswith(SKIPPED)
    ]
    return [*rules, (".*", _stored_choice(config))]


def _stored_choice(rule: Mapping[str, Any]) -> Choice:
    bits, group_size = rule["bits"], rule["group_size"]
    if type(bits) is not int or type(group_size) is not int or bits not in BITS or group_size not in GROUP_SIZES:
        raise ValueError(f"{bits!r} bits in groups of {group_size!r}")
    return Choice(bits=bits, group_size=group_size)


def _names(name: str, spec: LinearSpec | None) -> list[str]:
    if spec is None or spec.routed:
        return [name]
    return list(dict.fromkeys([name, *(stored.removesuffix(WEIGHT) for stored in spec.stored)]))


def _fused(name: str) -> str:
    """The module that vLLM makes of this one and others; empty if it makes none."""
    parent, _, last = name.rpartition(".")
    return f"{parent}.{FUSED[last]}" if last in FUSED else ""


def _zeros(choice: Choice, d_out: int, d_in: int) -> Tensor:
    # 2^(bits-1) - 1; the packer adds 2^(bits-1) to signed codes
    zeros: Tensor = pack_to_int32(torch.full((choice.groups(d_in), d_out), -1, dtype=torch.int8), choice.bits)
    return zeros


def _order(choice: Choice, d_in: int) -> Tensor:
    width = d_in if choice.group_size == -1 else choice.group_size
    return torch.arange(d_in, dtype=torch.int32) // width
