"""All-in bits per quantized weight in the files that a peer wrote, and whether what is scored has so few levels."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import safe_open

from benchmarks.peers.exchange import WEIGHTS

COUNTED = (
    *("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx"),  # compressed-tensors
    *("qweight", "scales", "qzeros", "g_idx"),  # GPTQ's layout
)
"""Codes, scales, zero points, the group of every column."""
CODES, SCALES = ("weight_packed", "qweight"), ("weight_scale", "scales")
WORD = 32
"""Bits of one stored integer of codes."""
ROWS_CHECKED = 16
NOT_COUNTED = ("bias", "weight_shape")
"""Not quantized; two integers that the model's configuration implies."""


def weights_of(model: Path, modules: Collection[str]) -> dict[str, int]:
    """Module -> number of its weights in the original.

    Raises:
        ValueError: the original has no such module.
    """
    found: dict[str, int] = {}
    for path in sorted(model.glob(WEIGHTS)):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                module, _, last = name.rpartition(".")
                if last == "weight" and module in modules:
                    rows, columns = file.get_slice(name).get_shape()
                    found[module] = rows * columns
    if missing := sorted(set(modules) - found.keys()):
        raise ValueError(f"{missing[0]}: no such module in {model}")
    return found


def all_in_bits(packed: Path, weights: dict[str, int]) -> float:
    """Bits that the packed checkpoint stores for one weight of the modules, whatever it stores of them.

    Raises:
        ValueError: a module is not quantized in it, or something is stored for one that is neither counted nor known.
    """
    bits = dict.fromkeys(weights, 0)
    for path in sorted(packed.glob(WEIGHTS)):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                module, _, last = name.rpartition(".")
                if module not in weights or last in NOT_COUNTED:
                    continue
                if last not in COUNTED:
                    raise ValueError(f"{name}: {packed} stores this for a quantized module, and it is not counted")
                bits[module] += _bits(file.get_tensor(name))
    if missing := [module for module, stored in bits.items() if not stored]:
        raise ValueError(f"{missing[0]}: no codes of it in {packed}")
    return sum(bits.values()) / sum(weights.values())


def check_levels(packed: Path, dense: Path, weights: dict[str, int]) -> None:
    """No row of a dense weight has more values than its stored codes and scales can make, in whatever order they lie.

    Raises:
        ValueError: one has: what is scored is not what was stored.
    """
    codes, scales = (_numels(packed, names) for names in (CODES, SCALES))
    for path in sorted(dense.glob(WEIGHTS)):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                module, _, last = name.rpartition(".")
                if last != "weight" or module not in weights:
                    continue
                weight = file.get_tensor(name)
                levels = 2 ** (codes[module] * WORD // weights[module]) * (scales[module] // len(weight))
                for row in weight[:: max(1, len(weight) // ROWS_CHECKED)]:
                    if (found := len(row.unique())) > levels:
                        raise ValueError(f"{name}: {found} values in a row, and {packed} has codes for {levels}")


def _numels(folder: Path, names: Collection[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for path in sorted(folder.glob(WEIGHTS)):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                module, _, last = name.rpartition(".")
                if last in names:
                    found[module] = math.prod(file.get_slice(name).get_shape())
    return found


def _bits(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size() * 8
