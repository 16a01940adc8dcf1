"""Reading a written checkpoint back: which module has which choice, and its codes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lrpq.checkpoint.compressed_tensors import PACKED, SCALE, SHAPE
from lrpq.checkpoint.layout import INDEX_FILE
from lrpq.checkpoint.plan import WEIGHT
from lrpq.errors import CheckpointError
from lrpq.model.layers import Choice
from lrpq.quant.grid import QuantizedWeight
from lrpq.quant.packing import unpack


class StoredCheckpoint:
    """A compressed-tensors checkpoint of format pack-quantized, one module at a time.

    Raises:
        CheckpointError: the folder is not such a checkpoint, or a file is damaged; the file is named.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._groups = _config_groups(folder)
        self._file_of: dict[str, Path] = {}
        for path in self._files():
            with self._opened(path) as handle:
                self._file_of.update(dict.fromkeys(handle.keys(), path))

    def choice(self, module: str) -> Choice | None:
        """Bits and group size of a module; None where it is not quantized.

        Raises:
            CheckpointError: the module is in none of the files, or has codes of no known choice.
        """
        if f"{module}.{PACKED}" not in self._file_of:
            if f"{module}{WEIGHT}" not in self._file_of:
                raise CheckpointError(
                    f"module {module}: has neither codes nor a weight in {self.folder}; the checkpoint is incomplete "
                    "or of another model"
                )
            return None
        for pattern, choice in self._groups:
            if pattern.fullmatch(module):
                return choice
        raise CheckpointError(f"module {module} in {self.folder}: has packed codes but no group in config.json")

    def modules(self) -> list[str]:
        """Names of all quantized modules, sorted."""
        return sorted(name.removesuffix(f".{PACKED}") for name in self._file_of if name.endswith(f".{PACKED}"))

    def codes(self, module: str) -> QuantizedWeight | None:
        """Codes and scales of a module; None where it is not quantized."""
        choice = self.choice(module)
        if choice is None:
            return None
        parts = {}
        for part in (PACKED, SCALE, SHAPE):
            name = f"{module}.{part}"
            if name not in self._file_of:
                raise CheckpointError(f"tensor {name}: is in no file of {self.folder}; the checkpoint is incomplete")
            with self._opened(self._file_of[name]) as handle:
                parts[part] = handle.get_tensor(name)
        return unpack(parts, choice)

    def _files(self) -> list[Path]:
        index = self.folder / INDEX_FILE
        if not index.is_file():
            return sorted(self.folder.glob("*.safetensors"))
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index}: not a safetensors index ({error!r})") from error
        if any(Path(name).name != name for name in names):
            raise CheckpointError(f"{index}: a shard's name leaves the folder")
        return [self.folder / name for name in sorted(names)]

    def _opened(self, path: Path) -> Any:
        try:
            return safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: missing, truncated or damaged ({error})") from error


def _config_groups(folder: Path) -> list[tuple[re.Pattern[str], Choice]]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))["quantization_config"]
        if config["format"] != "pack-quantized":
            raise CheckpointError(f"{path}: format {config['format']!r}; expected pack-quantized")
        groups = []
        for group in config["config_groups"].values():
            weights = group["weights"]
            size = -1 if weights["strategy"] == "channel" else int(weights["group_size"])
            choice = Choice(bits=int(weights["num_bits"]), group_size=size)
            groups += [(re.compile(target.removeprefix("re:")), choice) for target in group["targets"]]
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: no config.json; expected a folder written by lrpq compress") from error
    except (ValueError, KeyError, TypeError, AttributeError, re.error) as error:
        raise CheckpointError(f"{path}: not the configuration of a packed checkpoint ({error!r})") from error
    return groups
