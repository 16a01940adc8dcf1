"""A model on disk: config.json and safetensors, single file or sharded, read one tensor at a time."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig

from lrpq.errors import ModelError
from lrpq.finite import all_finite
from lrpq.model import hidden_type

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedConfig

INDEX = "model.safetensors.index.json"
READABLE = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    # masks and position ids of old checkpoints: carried over, never computed with
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' names of element types."""
ORIGINAL_WANTED = (
    "expected F32, F16 or BF16 weights (an already quantized model cannot be compressed: give the original)"
)
DOWNLOADED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "LICENSE*"]
MAX_DIMENSIONS = 64  # torch's limit
MAX_NUMEL = 2**63 - 1  # torch counts elements in 64 bits with a sign, sizes of zero left out
LISTED = re.compile(r"(?:^|_)(?:layers?|depths?|repeats?)$|^num_labels$")
"""Numbers of a configuration that transformers makes lists or mappings of that length from."""
MAX_LISTED = 10_000


def resolve_model(model: str) -> Path:
    """Return the local folder of ``model``: a folder, or a hub id whose files are fetched to the hub's cache.

    Raises:
        ModelError: the folder or the hub repository does not exist or cannot be reached.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise ModelError(f"model {model!r}: no such folder; give a folder of safetensors or a hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=DOWNLOADED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"model {model!r}: neither a local folder nor a hub model that can be reached ({one_line(error)}); "
            "check the name, or give a local folder"
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """Where a tensor lies."""

    shard: str
    """File name."""
    dtype: str
    """As the header spells it, e.g. ``BF16``."""
    shape: tuple[int, ...]
    begin: int
    """First byte, counted from the start of the file."""
    nbytes: int


class ModelSource:
    """Tensors and configuration of a model folder; no tensor is read before it is asked for.

    Opening checks every shard's header against its length, so a truncated shard is named before any work begins.
    Symbolic links in the folder are followed, for the hub's cache consists of them; names in an index are not.
    Tensors are read, not mapped: mapped pages would stay in the process's resident memory, which would then grow with
    the depth of the model.
    """

    as_on_disk: ClassVar[bool] = True
    """Whether transformers, given the folder, loads the same model."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ModelError(f"model {str(folder)!r}: no such folder")
        self.config: PreTrainedConfig = self._read_config()
        located = _locate_tensors(self.folder)
        self._entries: dict[str, _Entry] = {}
        self._checked: set[str] = set()
        for shard in sorted(set(located.values())):
            entries = _read_header(self.folder / shard)
            for name in (name for name, where in located.items() if where == shard):
                if name not in entries:
                    raise ModelError(f"shard {self.folder / shard}: tensor {name} is in the index but not in the file")
                self._entries[name] = entries[name]

    def _read_config(self) -> PreTrainedConfig:
        return _read_config(self.folder)

    def config_document(self) -> dict[str, Any]:
        """The configuration as JSON, from which a checkpoint of this model is described."""
        document = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        return dict(document)

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a tensor, from the header.

        Raises:
            ModelError: a dtype that no checkpoint of an unquantized model has.
        """
        stored = self._entry(name).dtype
        if stored not in READABLE:
            raise ModelError(f"tensor {name} in {self.folder}: stored as {stored}; {ORIGINAL_WANTED}")
        return READABLE[stored]

    def main_dtype(self) -> torch.dtype:
        """Floating-point dtype that most weights are stored in; float32 if there are none."""
        counts: Counter[torch.dtype] = Counter()
        for name in self.names():
            if name.endswith("weight") and (dtype := self.dtype(name)).is_floating_point:
                counts[dtype] += math.prod(self.shape(name))
        return counts.most_common(1)[0][0] if counts else torch.float32

    def nbytes(self, name: str) -> int:
        """Bytes a tensor takes in its file."""
        return self._entry(name).nbytes

    def read(self, name: str) -> Tensor:
        """Read one tensor to new host memory in its stored dtype, checked to be finite the first time.

        Raises:
            ModelError: no such tensor, a damaged shard, or NaN or infinity among the values.
        """
        entry, dtype = self._entry(name), self.dtype(name)
        path = self.folder / entry.shard
        tensor = torch.empty(entry.shape, dtype=dtype)
        if entry.nbytes:
            self._read_bytes(name, 0, tensor.view(-1).view(torch.uint8).numpy())
        if name not in self._checked:
            if not all_finite(tensor):
                bad = int((~torch.isfinite(tensor)).sum())
                raise ModelError(f"tensor {name} in {path}: {bad} values are NaN or infinite")
            self._checked.add(name)
        return tensor

    def read_rows(self, names: Sequence[str]) -> Tensor:
        """Read what computes: tensors whose rows, one after the other, make one.

        Values are as exact as the source has them, where `read` gives what a checkpoint stores.
        """
        return self.read(names[0]) if len(names) == 1 else torch.cat([self.read(name) for name in names])

    def read_some(self, name: str, rows: Sequence[int]) -> Tensor:
        """Some rows of a tensor as `read` gives them; of one that lies in a file, nothing else is read.

        Raises:
            ModelError: as `read`.
            IndexError: there is no such row.
        """
        num_rows, *rest = self.shape(name)
        chosen = [range(num_rows)[row] for row in rows]
        if not self.reads_files:
            return self.read(name)[chosen]
        found = torch.empty((len(chosen), math.prod(rest)), dtype=self.dtype(name))
        for row, memory in zip(chosen, found.view(torch.uint8).numpy(), strict=True):
            self.read_piece(name, row * len(memory), memory)
        return found.view(len(chosen), *rest)

    @property
    def reads_files(self) -> bool:
        """Whether what `read` and `read_rows` give are bytes of the files; not where a subclass makes them."""
        kind = type(self)
        return kind.read is ModelSource.read and kind.read_rows is ModelSource.read_rows

    def read_piece(self, name: str, start: int, memory: NDArray[np.uint8]) -> None:
        """Some bytes of a tensor of the files, checked as `read` does until ``pieces_read`` was told of them all.

        Args:
            name: of a tensor, of a source that ``reads_files``.
            start: the first byte; a whole number of values.
            memory: for so many bytes from there on; a whole number of values, aligned for them.

        Raises:
            ModelError: as `read`.
        """
        self._read_bytes(name, start, memory)
        if name not in self._checked and not all_finite(torch.from_numpy(memory).view(self.dtype(name))):
            self.read(name)  # counts all of them

    def pieces_read(self, name: str) -> None:
        """All bytes of a tensor went through ``read_piece``."""
        self._checked.add(name)

    def _read_bytes(self, name: str, start: int, memory: NDArray[np.uint8]) -> None:
        entry = self._entry(name)
        path, raw = self.folder / entry.shard, memory.data
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(entry.begin + start)
                got = 0
                while got < len(raw) and (count := file.readinto(raw[got:])):
                    got += count
        except OSError as error:
            raise ModelError(f"shard {path}: cannot read {name} ({error}); fetch the file again") from error
        if got < len(raw):
            raise ModelError(f"shard {path}: ends inside {name}; fetch the file again")

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise ModelError(f"model {self.folder}: tensor {name} is missing; the checkpoint is incomplete")
        return self._entries[name]


def one_line(error: BaseException) -> str:
    """First line of an error's message, fit for a terminal: what it quotes may come from a damaged file."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return "".join(char if char.isprintable() else "?" for char in lines[0])


def _read_header(path: Path) -> dict[str, _Entry]:
    """Header of a shard, validated against the file's length by the safetensors library.

    Raises:
        ModelError: the file is missing, truncated or corrupt.
    """
    if not os.path.isfile(path):  # a pipe or a device would be read without end
        raise ModelError(f"shard {path}: named in {INDEX} but missing; fetch the model again")
    try:
        with safe_open(path, framework="pt", device="cpu"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length), object_pairs_hook=_no_key_twice)
        entries = {
            name: _Entry(
                shard=path.name,
                dtype=entry["dtype"],
                shape=tuple(entry["shape"]),
                begin=8 + length + entry["data_offsets"][0],
                nbytes=entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in header.items()
            if name != "__metadata__"
        }
        for name, checked in entries.items():
            if not name.isprintable():
                raise ValueError(f"tensor name {name!r}")
            shape = checked.shape
            if len(shape) > MAX_DIMENSIONS or math.prod(size for size in shape if size) > MAX_NUMEL:
                raise ValueError(f"tensor {name} of shape {shape[:MAX_DIMENSIONS]}")
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ModelError(f"shard {path}: truncated or corrupt ({one_line(error)}); fetch the file again") from error
    return entries


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of the header; of two entries of a name, the library may have checked the other."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _read_config(folder: Path, *, quantized: bool = False) -> PreTrainedConfig:
    """Configuration of a model; with ``quantized``, also of one that is."""
    path = folder / "config.json"
    if not os.path.isfile(path):
        raise ModelError(f"model {folder}: no config.json; expected a Hugging Face model folder")
    try:
        for name, number in _numbers(json.loads(path.read_bytes())):
            if abs(number) > MAX_LISTED and LISTED.search(name):
                raise ValueError(f"{name} is {number}, expected {MAX_LISTED} at most")
        hidden_type.register()
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        names = config.architectures
        if names is not None and not (isinstance(names, list) and all(map(_is_name, names))):
            raise ValueError("architectures is no list of names")
    except Exception as error:  # whatever the configuration's own parser raises is a bad configuration
        raise ModelError(f"{path}: not a configuration transformers can read ({one_line(error)})") from error
    if not quantized and getattr(config, "quantization_config", None):
        raise ModelError(f"model {folder}: already quantized; give the original model")
    return config


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value.isprintable()


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Every number in a JSON document, with the key it stands under."""
    if isinstance(value, int | float):
        yield name, value
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item, name)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, key)


def _locate_tensors(folder: Path) -> dict[str, str]:
    """Map tensor name -> file name, from the index or from the single file."""
    index = folder / INDEX
    if index.is_file():
        try:
            located = dict(json.loads(index.read_bytes())["weight_map"].items())
        except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
            raise ModelError(f"{index}: not a safetensors index ({one_line(error)}); fetch it again") from error
        for name, shard in located.items():
            if not _is_name(name) or not _is_name(shard):
                raise ModelError(f"{index}: tensor {name!r} is in {shard!r}; expected printable names; fetch it again")
            if Path(shard).name != shard or shard == "..":
                raise ModelError(f"{index}: shard name {shard!r} leaves the model folder")
        if not located:
            raise ModelError(f"{index}: names no tensors; fetch it again")
        return located
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"model {folder}: no *.safetensors; convert the model to safetensors first")
    if len(files) > 1:
        raise ModelError(f"model {folder}: {len(files)} safetensors files but no {INDEX}; fetch the index")
    located = dict.fromkeys(_read_header(folder / files[0]), files[0])
    if not located:
        raise ModelError(f"shard {folder / files[0]}: holds no tensors; fetch the file again")
    return located
