"""The ``compressed-tensors`` description of a mixed-precision model: which module has which bits and groups.

Format ``pack-quantized``, symmetric: a quantized module ``m`` has, instead of ``m.weight``,

    m.weight_packed  int32 [d_out, ceil(d_in * bits / 32)]   codes, without gaps, each row padded to 32 bits
    m.weight_scale   bf16  [d_out, groups]
    m.weight_shape   int64 [2]                               d_out, d_in

Every module is named by an anchored pattern: a catch-all such as ``Linear`` would let the first group of the
configuration win for all. Linear layers that are listed nowhere are an error in vLLM, so what stays dense is
listed too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from lrpq.checkpoint.layout import StoredTensor
from lrpq.errors import ConfigError
from lrpq.model.layers import Choice, LinearSpec

METHOD = "compressed-tensors"
FORMAT = "pack-quantized"
PACKED, SCALE, SHAPE = "weight_packed", "weight_scale", "weight_shape"
WORD_BITS = 32
SUPPORTED_BITS = range(2, 9)  # a sign and at least one more bit; the packer's upper limit
_NUMBER = re.compile(r"\\\.(\d+)(?=\\\.|$)")  # the first part of an escaped name that is a number


def natural_key(name: str) -> tuple[tuple[bool, int, str], ...]:
    """Sort key that puts ``layers.2`` before ``layers.10``."""
    return tuple((part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split("."))


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


def stored_tensors(module: str, *, d_out: int, d_in: int, choice: Choice) -> tuple[StoredTensor, ...]:
    """Names, dtypes and shapes of the tensors that hold a quantized module.

    Raises:
        ConfigError: the format cannot store the choice.
    """
    check_choice(module, choice, d_in)
    words = -(-d_in * choice.bits // WORD_BITS)
    return (
        StoredTensor(name=f"{module}.{PACKED}", dtype=torch.int32, shape=(d_out, words)),
        StoredTensor(name=f"{module}.{SCALE}", dtype=torch.bfloat16, shape=(d_out, choice.groups(d_in))),
        StoredTensor(name=f"{module}.{SHAPE}", dtype=torch.int64, shape=(2,)),
    )


def quantization_config(
    choices: Mapping[str, Choice], *, specs: Sequence[LinearSpec] = (), ignore: Iterable[str] = ()
) -> dict[str, Any]:
    """Describe the quantized modules for ``config.json``; the same choices give the same text in any order.

    Args:
        choices: module name -> bits and group size, without the modules that stay dense.
        specs: linear layers; those of other names on disk are described by both names, experts by their block's.
        ignore: names of the linear modules that stay dense, the head among them.

    Raises:
        ConfigError: no module is quantized, one is both quantized and ignored, or its bits cannot be packed.
    """
    ignored = sorted(set(ignore), key=natural_key)
    both = [name for name in ignored if name in choices]
    if both:
        raise ConfigError(f"module {both[0]}: both quantized and ignored; expected one of the two")
    if not choices:
        raise ConfigError("no module is quantized: the checkpoint would equal the original; give at least one choice")
    by_name = {spec.name: spec for spec in specs}
    members: dict[Choice, list[tuple[str, ...]]] = {}
    for name in sorted(choices, key=natural_key):
        check_choice(name, choices[name], d_in=max(choices[name].group_size, 1))  # widths are checked with the shapes
        members.setdefault(choices[name], []).append(_patterns(name, by_name.get(name)))
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "ignore": ignored,
        "config_groups": {
            f"group_{i}": {
                "format": FORMAT,
                "targets": _targets(members[choice]),
                "weights": _weights(choice),
            }
            for i, choice in enumerate(sorted(members))
        },
    }


def expert_patterns(spec: LinearSpec) -> tuple[str, ...]:
    """Regular expressions for the experts of a block: the loaded module that holds them, and their layers on disk.

    All projections match, whatever they are called: vLLM asks for ``gate_proj`` also where the disk says ``w1``.
    """
    module = spec.name.rsplit(".", 2)[0]
    on_disk = sorted({stored.rsplit(".", 3)[0] for stored in spec.stored})
    return (re.escape(module), *(re.escape(stem) + r"\.\d+\.\w+" for stem in on_disk))


def _weights(choice: Choice) -> dict[str, Any]:
    by_channel = choice.group_size == -1
    return {
        "num_bits": choice.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if by_channel else "group",
        "group_size": None if by_channel else choice.group_size,
        "dynamic": False,
    }


def _patterns(name: str, spec: LinearSpec | None) -> tuple[str, ...]:
    """Regular expressions of all the names that a module goes by."""
    if spec is None:
        return (re.escape(name),)
    if spec.routed:
        return expert_patterns(spec)
    on_disk = [stored.removesuffix(".weight") for stored in spec.stored]
    return tuple(re.escape(alias) for alias in dict.fromkeys([name, *on_disk]))


def _targets(modules: Iterable[tuple[str, ...]]) -> list[str]:
    """Anchored patterns that match exactly ``modules``: one for all the layers of a kind, whatever their names.

    One pattern a module would be exact too, but Python keeps 512 compiled patterns and the loader tries every
    pattern on every module: with the 560 linear layers of a 70B model each try would compile anew. Names that a
    module goes by elsewhere share its pattern, as the loader warns of patterns that match nothing.
    """
    layers: dict[tuple[tuple[str, str], ...], dict[str, None]] = {}
    targets: set[str] = set()
    for aliases in modules:
        matches = [match for alias in aliases if (match := _NUMBER.search(alias))]
        numbers = {match.group(1) for match in matches}
        if len(numbers) == 1 and len(matches) == len(aliases):
            around = tuple((match.string[: match.start(1)], match.string[match.end(1) :]) for match in matches)
            layers.setdefault(around, {}).update(dict.fromkeys(numbers))
        else:
            targets.add(_anchored(aliases))
    for around, indices in layers.items():
        number = f"(?:{'|'.join(indices)})" if len(indices) > 1 else next(iter(indices))
        targets.add(_anchored([before + number + after for before, after in around]))
    return sorted(targets)


def _anchored(aliases: Sequence[str]) -> str:
    return f"re:^{aliases[0]}$" if len(aliases) == 1 else f"re:^(?:{'|'.join(aliases)})$"
