"""Where every byte of a safetensors checkpoint lies, known from shapes alone, and a writer that fills it in.

The format (safetensors README): 8 bytes little-endian length of the header, the header (JSON, padded with
spaces), then the tensors without gaps. Laying it out by hand instead of saving a dictionary keeps one tensor
in memory instead of a shard, makes the size exact before anything is written, and makes the bytes a function
of the content alone.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from lrpq.errors import CheckpointError
from lrpq.model.safetensors_source import READABLE

DTYPE_NAMES: Mapping[torch.dtype, str] = {
    **{dtype: name for name, dtype in READABLE.items()},
    torch.float8_e4m3fn: "F8_E4M3",  # scales; an original with weights of this type is not read
}
ALIGNMENT = 8  # bytes; the safetensors library aligns the first tensor so, and no element type here is wider
METADATA = {"format": "pt"}  # transformers refuses a file without it
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor of the checkpoint, before it has values."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file, header apart."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One file of the checkpoint."""

    file_name: str
    units: tuple[tuple[StoredTensor, ...], ...]
    """Tensors that are made together, such as codes and scales of a module, in the order to make them."""
    head: bytes
    """Length field and header, padded."""
    offsets: Mapping[str, int]
    """Tensor name -> its first byte, counted from the start of the file."""
    nbytes: int
    """Bytes of the whole file."""


def plan_shards(units: Sequence[Sequence[StoredTensor]], *, max_shard_bytes: int) -> tuple[Shard, ...]:
    """Cut the tensors into files of at most ``max_shard_bytes`` of data, named as transformers does.

    Units are kept in order and never split, so one above the limit has a larger file of its own.
    """
    bins: list[list[tuple[StoredTensor, ...]]] = []
    filled = 0
    for unit in units:
        size = sum(tensor.nbytes for tensor in unit)
        if not bins or filled + size > max_shard_bytes:
            bins.append([])
            filled = 0
        bins[-1].append(tuple(unit))
        filled += size
    if len(bins) == 1:
        return (_shard(SINGLE_FILE, bins[0]),)
    return tuple(_shard(f"model-{i + 1:05d}-of-{len(bins):05d}.safetensors", b) for i, b in enumerate(bins))


def index_text(shards: Sequence[Shard], *, num_parameters: int) -> str:
    """Contents of the index file: which tensor is in which file."""
    sizes = [tensor.nbytes for shard in shards for unit in shard.units for tensor in unit]
    weight_map = {name: shard.file_name for shard in shards for name in shard.offsets}
    metadata = {"total_parameters": num_parameters, "total_size": sum(sizes)}
    return json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"


class ShardWriter:
    """Puts tensors of a shard at their places, in any order; made by :func:`open_shard`."""

    def __init__(self, handle: FileIO, shard: Shard) -> None:
        self._handle = handle
        self._shard = shard
        self._missing = {tensor.name: tensor for unit in shard.units for tensor in unit}

    def write(self, name: str, values: Tensor) -> None:
        """Write one tensor, once.

        Raises:
            CheckpointError: the tensor is not one of this shard's, is written already or is not as planned,
                or the disk is full.
        """
        planned = self._missing.pop(name, None)
        if planned is None:
            raise CheckpointError(f"{self._shard.file_name}: tensor {name} is written twice or was not planned")
        if values.dtype != planned.dtype or tuple(values.shape) != planned.shape:
            raise CheckpointError(
                f"tensor {name}: is {values.dtype} {list(values.shape)}; "
                f"expected {planned.dtype} {list(planned.shape)}, as planned from the choices"
            )
        # numpy shares the tensor's memory and gives a buffer; a view as bytes needs one dimension at least
        buffer = values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        self._handle.seek(self._shard.offsets[name])
        _write_all(self._handle, buffer.data, self._shard.file_name)

    def finish(self) -> None:
        """Check that nothing is missing.

        Raises:
            CheckpointError: a planned tensor was not written.
        """
        if self._missing:
            raise CheckpointError(f"{self._shard.file_name}: tensor {next(iter(self._missing))} was never written")


@contextmanager
def open_shard(folder: Path, shard: Shard) -> Iterator[ShardWriter]:
    """Create the file of a shard and yield its writer; on leaving, every tensor has been written.

    Raises:
        CheckpointError: a tensor was missing, the file cannot be written, or this machine is big-endian.
    """
    if sys.byteorder != "little":
        raise CheckpointError("safetensors files are little-endian and this machine is not; write on another one")
    try:
        handle = FileIO(folder / shard.file_name, "w")
    except OSError as error:
        raise CheckpointError(f"{folder / shard.file_name}: cannot be created ({error.strerror})") from error
    with handle:
        _write_all(handle, memoryview(shard.head), shard.file_name)
        writer = ShardWriter(handle, shard)
        yield writer
        writer.finish()


def _write_all(handle: FileIO, data: memoryview, file_name: str) -> None:
    """Write without a buffer, so that a full disk is an error here and not when the file is closed."""
    try:
        while data.nbytes:
            data = data[handle.write(data) :]  # one call writes 2 GB at most
    except OSError as error:
        raise CheckpointError(
            f"{file_name}: cannot be written ({error.strerror}); free the disk or give another folder"
        ) from error


def _shard(file_name: str, units: Sequence[tuple[StoredTensor, ...]]) -> Shard:
    tensors = [tensor for unit in units for tensor in unit]
    # Wide elements first (the sort is stable): tensors are then aligned to their elements, as in the library.
    tensors.sort(key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": METADATA}
    starts: dict[str, int] = {}
    end = 0
    for tensor in tensors:
        if tensor.name in starts:
            raise CheckpointError(f"tensor {tensor.name}: planned twice; two modules have the same name")
        if tensor.dtype not in DTYPE_NAMES:
            raise CheckpointError(f"tensor {tensor.name}: {tensor.dtype} has no place in a safetensors file")
        starts[tensor.name] = end
        span = [end, end + tensor.nbytes]
        header[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": span,
        }
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    head = len(text).to_bytes(8, "little") + text
    return Shard(
        file_name=file_name,
        units=tuple(units),
        head=head,
        offsets={name: len(head) + start for name, start in starts.items()},
        nbytes=len(head) + end,
    )
