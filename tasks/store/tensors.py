"""Tensors as safetensors objects, and symmetric matrices (see symmetric.py).

The file is written here and not by the safetensors package: its metadata is a hash map, so the bytes would
differ from run to run, and it needs the whole object in memory. The package reads what is written here.

``__metadata__`` holds the caller's entries, ``lrpq.schema``, ``lrpq.key``, ``lrpq.creator``, ``sha256:NAME`` for every
tensor (over its bytes) and ``lrpq.sha256`` over the rest of the header: names, dtypes, shapes, offsets,
metadata and those digests. So a reader of a few tensors verifies exactly what it reads.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO, cast

import torch
from torch import Tensor

import lrpq
from lrpq.errors import StoreError
from tasks.store.documents import JSON, SCHEMA_VERSION, canonical_text, check_written_as, parse_object, sha256_text
from tasks.store.host_threads import in_order
from tasks.store.objects import ObjectStore
from tasks.store.schema import opened
from tasks.store.symmetric import SymmetricIndex, read_symmetric, symmetric_index, write_symmetric

__all__ = [
    "SymmetricIndex",
    "read_symmetric",
    "read_metadata",
    "read_tensors",
    "symmetric_index",
    "write_symmetric",
    "write_tensors",
]

_METADATA = "__metadata__"
_OURS = ("lrpq.", "sha256:")
_DIGEST = "lrpq.sha256"
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors package
_MAX_DIMENSIONS = 64  # torch's limit
_MAX_NUMEL = 2**63 - 1  # torch counts elements in 64 bits with a sign, sizes of zero left out
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def write_tensors(
    store: ObjectStore, key: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Publish tensors of any device, or leave the object that is there; same content, same bytes.

    Raises:
        StoreError: a dtype or name that safetensors cannot hold, metadata that is not text, a failed write.
    """
    header = _header(key, tensors, metadata or {})
    text = canonical_text(header).encode("ascii")
    text += b" " * (-len(text) % _LENGTH_BYTES)  # tensors start on 8-byte boundaries

    def write(file: BinaryIO) -> None:
        file.write(len(text).to_bytes(_LENGTH_BYTES, "little"))
        file.write(text)
        for name in _order(tensors):
            file.write(_raw(tensors[name]))

    store.publish(key, write)


def read_tensors(store: ObjectStore, key: str, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Tensors on the CPU, all or those named; only they are read, and they are verified.

    Raises:
        StoreError: no such object, no such tensor, or the object is truncated, changed or foreign.
    """
    with opened(store, key) as file:
        header, start, size = _read_header(file, key)
        entries = {name: _entry(name, entry) for name, entry in header.items() if name != _METADATA}
        _check_layout(entries, size - start)
        wanted = sorted(entries) if names is None else list(names)
        if missing := [name for name in wanted if name not in entries]:
            raise StoreError(f"{key} in {store.url} has no tensor {missing[0]!r}: it has {_some(sorted(entries))}")
        digests = _metadata(header)
        calls = (
            _verified(name, entries[name], _raw_bytes(file, start, name, entries[name]), digests.get(f"sha256:{name}"))
            for name in wanted
        )
        with closing(in_order(calls)) as tensors:
            return dict(zip(wanted, tensors, strict=True))


def read_metadata(store: ObjectStore, key: str) -> dict[str, str]:
    """The caller's metadata, verified; no tensor is read.

    Raises:
        StoreError: no such object, or its header is truncated, changed or foreign.
    """
    with opened(store, key) as file:
        header, _, _ = _read_header(file, key)
        return {name: text for name, text in _metadata(header).items() if not name.startswith(_OURS)}


def _header(key: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, JSON]:
    for name, text in metadata.items():
        if not isinstance(name, str) or not isinstance(text, str) or name.startswith(_OURS):
            raise StoreError(f"cannot write {key}: metadata {name!r} must be text under a name not starting {_OURS}")
    header: dict[str, JSON] = {}
    ours = {"lrpq.schema": str(SCHEMA_VERSION), "lrpq.key": key, "lrpq.creator": f"lrpq {lrpq.__version__}"}
    full = {**metadata, **ours}
    offset = 0
    order = _order(tensors)
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _NAMES or tensor.layout != torch.strided or tensor.is_meta or name == _METADATA:
            raise StoreError(f"cannot write {key}: safetensors holds no {tensor.layout} {tensor.dtype} named {name!r}")
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    with closing(in_order(partial(_digest, tensors[name]) for name in order)) as digests:
        full |= {f"sha256:{name}": digest for name, digest in zip(order, digests, strict=True)}
    header[_METADATA] = dict(full)
    header[_METADATA] = {**full, _DIGEST: sha256_text(canonical_text(header))}
    return header


def _order(tensors: Mapping[str, Tensor]) -> list[str]:
    # Wide dtypes first, so that every tensor is aligned to its own element size.
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(_raw(tensor)).hexdigest()


def _raw(tensor: Tensor) -> memoryview:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _read_header(file: BinaryIO, key: str) -> tuple[dict[str, JSON], int, int]:
    """Header, where the tensors start, length of the object."""
    size = file.seek(0, 2)
    file.seek(0)
    length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    start = _LENGTH_BYTES + length
    if length > min(_MAX_HEADER_BYTES, size - _LENGTH_BYTES):
        raise ValueError(f"its header should have {length} bytes, the object has {size}")
    header = parse_object(file.read(length))
    metadata = _metadata(header)
    if _DIGEST not in metadata:
        raise ValueError("it was not written by this store")
    if metadata.get("lrpq.schema") != str(SCHEMA_VERSION):
        raise ValueError(f"its schema is {metadata.get('lrpq.schema')}, this version reads {SCHEMA_VERSION}")
    digest = metadata.pop(_DIGEST)
    if digest != sha256_text(canonical_text({**header, _METADATA: metadata})):
        raise ValueError("the checksum of its header does not fit")
    check_written_as(metadata.get("lrpq.key"), key)
    return header, start, size


def _metadata(header: Mapping[str, JSON]) -> dict[str, str]:
    found = header.get(_METADATA)
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise ValueError("it has no metadata")
    return dict(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    """First byte, counted from the end of the header."""
    end: int


def _entry(name: str, entry: JSON) -> _Entry:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]} if dtype in _DTYPES:
            sizes = tuple(size for size in shape if type(size) is int and size >= 0)
            numel = math.prod(size for size in sizes if size)
            if len(sizes) == len(shape) <= _MAX_DIMENSIONS and numel <= _MAX_NUMEL:
                return _Entry(dtype=_DTYPES[dtype], shape=sizes, begin=begin, end=end)
    raise ValueError(f"the entry of tensor {name!r} is malformed")


def _check_layout(entries: Mapping[str, _Entry], num_bytes: int) -> None:
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        numel = 1
        for size in entry.shape:
            numel *= size
        if entry.begin != at or entry.end - at != numel * entry.dtype.itemsize:
            raise ValueError(f"the place of tensor {name!r} does not fit its shape")
        at = entry.end
    if at != num_bytes:
        raise ValueError(f"it holds {num_bytes} bytes of tensors, expected {at}")


def _raw_bytes(file: BinaryIO, start: int, name: str, entry: _Entry) -> bytearray:
    file.seek(start + entry.begin)
    raw = bytearray(entry.end - entry.begin)
    if cast(io.BufferedIOBase, file).readinto(raw) != len(raw):
        raise ValueError(f"it ends inside tensor {name!r}")
    return raw


def _verified(name: str, entry: _Entry, raw: bytearray, digest: str | None) -> Callable[[], Tensor]:
    """Gives the tensor of these bytes when it is called, unless they are not those that were written."""

    def tensor() -> Tensor:
        if hashlib.sha256(raw).hexdigest() != digest:
            raise ValueError(f"the checksum of tensor {name!r} does not fit its bytes")
        if not raw:
            return torch.empty(entry.shape, dtype=entry.dtype)
        return torch.frombuffer(raw, dtype=entry.dtype).reshape(entry.shape)

    return tensor


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f", ... ({len(names)} in all)" if len(names) > 5 else "")
