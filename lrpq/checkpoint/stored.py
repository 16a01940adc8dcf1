"""Reading a written checkpoint back: which module has which choice, and its codes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lrpq.checkpoint import gptq, trellis
from lrpq.checkpoint.activations import INPUT_SCALE, ZERO_POINT
from lrpq.checkpoint.compressed_tensors import PACKED, SCALE, SHAPE, STEPS, SUPPORTED_BITS, SYMBOLS
from lrpq.checkpoint.formats import CheckpointFormat
from lrpq.checkpoint.layout import INDEX_FILE
from lrpq.checkpoint.modules import WEIGHT
from lrpq.checkpoint.publish import MANIFEST
from lrpq.errors import CheckpointError
from lrpq.finite import all_finite
from lrpq.model.layers import Choice, LinearSpec
from lrpq.model.safetensors_source import one_line
from lrpq.quant.grid import QuantizedWeight
from lrpq.quant.packing import unpack

STORED_AS = {PACKED: ("I32",), SCALE: ("BF16", "F16", "F32", "F8_E4M3"), SHAPE: ("I64", "I32")}
"""Part of a module -> the types it may be stored in."""
DIMENSIONS = {PACKED: 2, SCALE: 2, SHAPE: 1}
STORED_AS |= {gptq.QWEIGHT: ("I32",), gptq.QZEROS: ("I32",), gptq.SCALES: ("F16",), gptq.ORDER: ("I32",)}
DIMENSIONS |= {gptq.QWEIGHT: 2, gptq.QZEROS: 2, gptq.SCALES: 2, gptq.ORDER: 1}
DENSE = WEIGHT.removeprefix(".")
STORED_AS[DENSE], DIMENSIONS[DENSE] = ("BF16", "F16", "F32", "F64"), 2
STORED_AS |= {INPUT_SCALE: ("BF16", "F16", "F32"), ZERO_POINT: ("I8",)}
DIMENSIONS |= {INPUT_SCALE: 1, ZERO_POINT: 1}
CODES = {
    CheckpointFormat.COMPRESSED_TENSORS: PACKED,
    CheckpointFormat.GPTQ: gptq.QWEIGHT,
    CheckpointFormat.TRELLIS: PACKED,
}
"""The part that says that a module is quantized; a dense checkpoint has none."""
Group = tuple[re.Pattern[str], Choice, Any]
"""Names of modules, their choice, and ``input_activations``."""
_DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
MAX_QUANTIFIERS = 3
"""Quantifiers in a pattern: each more multiplies the time of a module that almost matches by the length of its name."""


class StoredCheckpoint:
    """A checkpoint of any `CheckpointFormat`, one module at a time; modules go by their names on disk.

    A dense one is told from any model by its manifest. It has no codes, and every weight is its own.

    Raises:
        CheckpointError: the folder is not such a checkpoint, or a file is damaged; the file is named.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.format, self._groups = _description(folder)
        self._file_of: dict[str, Path] = {}
        for path in self._files():
            with self._opened(path) as handle:
                names = handle.keys()
            for name in names:
                if not name.isprintable():
                    raise CheckpointError(f"{path}: damaged (tensor name {name!r}); fetch the file again")
                self._file_of[name] = path
        packed = [name for name in self._file_of if name.endswith(tuple(f".{part}" for part in CODES.values()))]
        if self.format is CheckpointFormat.DENSE and packed:
            raise CheckpointError(f"{folder}: tensor {packed[0]} has codes that config.json does not describe")

    def choice(self, module: str) -> Choice | None:
        """Bits and group size of a module; None where it is not quantized.

        Raises:
            CheckpointError: the module is in none of the files, or has codes of no known choice.
        """
        if self.format not in CODES or f"{module}.{CODES[self.format]}" not in self._file_of:
            if f"{module}{WEIGHT}" not in self._file_of:
                raise CheckpointError(
                    f"module {module}: has neither codes nor a weight in {self.folder}; the checkpoint is incomplete "
                    "or of another model"
                )
            return None
        group = self._group(module)
        if group is not None:
            return group[0]
        raise CheckpointError(f"module {module} in {self.folder}: has packed codes but no group in config.json")

    def inputs(self, module: str) -> Any:
        """``input_activations`` of a quantized module's group, as config.json has it; None where it has none."""
        group = self._group(module)
        return None if group is None else group[1]

    def modules(self) -> list[str]:
        """Names of all modules with codes, sorted."""
        if self.format not in CODES:
            return []
        ending = f".{CODES[self.format]}"
        return sorted(name.removesuffix(ending) for name in self._file_of if name.endswith(ending))

    def codes(self, module: str) -> QuantizedWeight | None:
        """Codes and scales of a module; None where it is not quantized.

        Raises:
            CheckpointError: see ``choice``; or a part is missing, or is not what the choice says.
        """
        choice = self.choice(module)
        if choice is None:
            return None
        if self.format is CheckpointFormat.GPTQ:
            parts = {part: self.part(module, part) for part in gptq.PARTS}
            try:
                return gptq.unpacked(module, parts, choice)
            except CheckpointError as error:
                raise CheckpointError(f"{self.folder}: {error}") from error
        parts = {part: self.part(module, part) for part in (PACKED, SCALE, SHAPE)}
        self._fitting(module, parts[SHAPE], choice)
        if not bool(torch.isfinite(parts[SCALE].float() * 2 ** (choice.bits - 1)).all()):
            raise CheckpointError(
                f"module {module} in {self.folder}: a scale is not finite, or its weights are not; fetch it again"
            )
        try:
            return unpack(parts, choice)
        except CheckpointError as error:
            raise CheckpointError(f"module {module} in {self.folder}: {error}") from error

    def weight(self, spec: LinearSpec, dtype: torch.dtype) -> Tensor | None:
        """Dequantized weight [d_out, d_in] of a layer of the original; None where it is the original's.

        Raises:
            CheckpointError: see ``codes``; or the layer has another shape, or only a part of it is quantized.
        """
        modules = [stored.removesuffix(WEIGHT) for stored in spec.stored]
        parts: list[Tensor]
        if self.format is CheckpointFormat.DENSE:
            parts = [self.part(module, DENSE).to(dtype) for module in modules]
            if not all(map(all_finite, parts)):
                raise CheckpointError(f"module {spec.name} in {self.folder}: a weight is not finite; fetch it again")
        else:
            codes = [found for module in modules if (found := self.codes(module)) is not None]
            parts = [part.dequantize(dtype, name=spec.name) for part in codes]
        if not parts:
            return None
        shape = sum(len(part) for part in parts), parts[0].shape[1]
        if len(parts) < len(modules) or shape != (spec.d_out, spec.d_in) or len({p.shape[1] for p in parts}) > 1:
            raise CheckpointError(
                f"module {spec.name} in {self.folder}: has shape {shape}, the original {(spec.d_out, spec.d_in)}; give "
                "the model that the checkpoint was made from"
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def dense(self, module: str) -> Tensor:
        """Weight of a module that is not quantized, as it is stored.

        Raises:
            CheckpointError: it is in no file, or is no matrix.
        """
        return self.part(module, DENSE)

    def packed_shape(self, module: str) -> tuple[int, int]:
        """d_out, d_in of a module with packed codes, which are not read.

        Raises:
            CheckpointError: see ``codes``.
        """
        choice = self.choice(module)
        if choice is None:
            raise CheckpointError(f"module {module} in {self.folder}: is not quantized")
        return self._fitting(module, self.part(module, SHAPE), choice)

    def _fitting(self, module: str, stored: Tensor, choice: Choice) -> tuple[int, int]:
        shape = [int(size) for size in stored]
        if len(shape) != 2 or min(shape) < 1 or not choice.fits(shape[1]):
            raise CheckpointError(
                f"module {module} in {self.folder}: has the shape {shape}, expected two sizes that {choice} fits; "
                "fetch the checkpoint again"
            )
        return shape[0], shape[1]

    def _group(self, module: str) -> tuple[Choice, Any] | None:
        for pattern, choice, inputs in self._groups:
            if pattern.fullmatch(module):
                return choice, inputs
        return None

    def part(self, module: str, part: str) -> Tensor:
        """One of a module's tensors, as it is stored.

        Raises:
            CheckpointError: it is in no file, or of another type or number of dimensions than such a part has.
        """
        name = f"{module}.{part}"
        if name not in self._file_of:
            raise CheckpointError(f"tensor {name}: is in no file of {self.folder}; the checkpoint is incomplete")
        path = self._file_of[name]
        with self._opened(path) as handle:
            entry = handle.get_slice(name)
            dtype, dimensions = entry.get_dtype(), len(entry.get_shape())
            if dtype not in STORED_AS[part] or dimensions != DIMENSIONS[part]:
                raise CheckpointError(
                    f"tensor {name} in {path}: is {dtype} with {dimensions} dimensions, expected "
                    f"{' or '.join(STORED_AS[part])} with {DIMENSIONS[part]}; fetch the file again"
                )
            tensor: Tensor = handle.get_tensor(name)
        return tensor

    def _files(self) -> list[Path]:
        index = self.folder / INDEX_FILE
        if not index.is_file():
            return sorted(self.folder.glob("*.safetensors"))
        try:
            names = set(json.loads(index.read_bytes())["weight_map"].values())
        except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{index}: not a safetensors index ({one_line(error)})") from error
        for name in names:
            if not isinstance(name, str) or not name.isprintable() or Path(name).name != name or name == "..":
                raise CheckpointError(f"{index}: a shard's name leaves the folder or is no name ({name!r})")
        return [self.folder / name for name in sorted(names)]

    def _opened(self, path: Path) -> Any:
        try:
            if not os.path.isfile(path):  # a pipe or a device would be read without end
                raise FileNotFoundError("no such file")
            return safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: missing, truncated or damaged ({one_line(error)})") from error


def _description(folder: Path) -> tuple[CheckpointFormat, list[Group]]:
    path = folder / "config.json"
    try:
        if path.exists() and not path.is_file():
            raise ValueError("no file")
        document = json.loads(path.read_bytes())
        if "quantization_config" not in document and (folder / MANIFEST).is_file():
            return CheckpointFormat.DENSE, []
        config = document["quantization_config"]
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: no config.json; expected a folder written by lrpq compress") from error
    except _DAMAGED as error:
        raise CheckpointError(f"{path}: not the configuration of a packed checkpoint ({one_line(error)})") from error
    return described(config, str(path))


def described(config: Any, where: str) -> tuple[CheckpointFormat, list[Group]]:
    """Format, and patterns of the modules with their choices, of a ``quantization_config``.

    Args:
        config: as it is read.
        where: it is from, for errors.

    Raises:
        CheckpointError: it is of no known format or version, or damaged.
    """
    try:
        if config.get("quant_method") == gptq.METHOD:
            rules = gptq.stored_choices(config)
            return CheckpointFormat.GPTQ, [(_pattern(pattern), choice, None) for pattern, choice in rules]
        streams = config.get("quant_method") == trellis.METHOD
        if streams:
            trellis.check_reader(config)
        elif config["format"] != "pack-quantized":
            raise CheckpointError(f"{where}: format {config['format']!r}; expected pack-quantized")
        groups: list[Group] = []
        for group in config["config_groups"].values():
            choice = _choice(group["weights"], symbols=config["codebooks"] if streams else {})
            groups += [(_pattern(target), choice, group.get("input_activations")) for target in group["targets"]]
    except _DAMAGED as error:
        raise CheckpointError(f"{where}: not the configuration of a packed checkpoint ({one_line(error)})") from error
    return CheckpointFormat.TRELLIS if streams else CheckpointFormat.COMPRESSED_TENSORS, groups


def _choice(weights: dict[str, Any], *, symbols: Collection[str]) -> Choice:
    """Widths whose codes may be symbols are given as text. Raises ValueError, LookupError, TypeError or AttributeError
    for what is neither those nor a symmetric integer grid."""
    stream = weights.get("type") == SYMBOLS and str(weights["num_bits"]) in symbols
    if (weights.get("type", STEPS) != STEPS and not stream) or weights.get("symmetric", True) is not True:
        raise ValueError("expected symmetric integers")
    bits, strategy = weights["num_bits"], weights["strategy"]
    size = {"channel": -1, "group": weights.get("group_size")}[strategy]
    if type(bits) is not int or bits not in SUPPORTED_BITS:
        raise ValueError(f"{bits!r} bits")
    if type(size) is not int or (strategy == "group" and size < 1):
        raise ValueError(f"group size {size!r}")
    stored_as = weights.get("scale_dtype")
    if stored_as not in (None, str(torch.bfloat16), str(torch.float8_e4m3fn)):
        raise ValueError(f"scales stored as {stored_as!r}")
    scale_bits = 8 if stored_as == str(torch.float8_e4m3fn) else 16
    return Choice(bits=bits, group_size=size, scale_bits=scale_bits, trellis=stream)


def _pattern(target: str) -> re.Pattern[str]:
    """Compile a target, unless a name could keep it busy for ever. Raises ValueError, TypeError or AttributeError."""
    text = target.removeprefix("re:")
    if any(f"){sign}" in text for sign in "*+{") or sum(map(text.count, "*+{")) > MAX_QUANTIFIERS:
        raise ValueError(f"the pattern {text[:60]!r} repeats a group, or more than {MAX_QUANTIFIERS} characters")
    try:
        return re.compile(text)
    except (re.error, OverflowError) as error:
        raise ValueError(f"the pattern {text[:60]!r}: {error}") from error
