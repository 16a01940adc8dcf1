"""What every Parquet object of the store says about itself, and how a reader knows that it is unharmed.

Metadata of the Arrow schema: ``lrpq.schema`` (format version), ``lrpq.key`` (the object's own, so that another
object in its place is refused), ``lrpq.kind``, ``lrpq.creator`` (lrpq's version), ``lrpq.rows``, ``lrpq.units``
(JSON, column to unit) and ``lrpq.sha256`` over all of these, the columns' names and types and, where a table is
written in one go, their values. Nothing in it depends on the time or the machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

import lrpq
from lrpq.errors import StoreError
from tasks.store.documents import SCHEMA_VERSION, canonical_text, check_written_as
from tasks.store.objects import one_line

if TYPE_CHECKING:
    from tasks.store.objects import ObjectStore

_PREFIX = "lrpq."
_DIGEST = "lrpq.sha256"

PARSE_ERRORS: tuple[type[Exception], ...] = (
    pa.ArrowException,
    OSError,
    ValueError,  # also UnicodeDecodeError and JSONDecodeError
    LookupError,
    OverflowError,
    EOFError,
    RecursionError,
)
"""What parsers raise on bytes that are not what they should be."""


def damaged(store: ObjectStore, key: str, why: str) -> StoreError:
    """The error for an object that is truncated, changed or foreign."""
    why = "".join(char if char.isprintable() else "?" for char in why)  # it may quote the object
    return StoreError(f"{key} in {store.url} is damaged or not what it should be: {why}; delete it and run again")


@contextmanager
def opened(store: ObjectStore, key: str) -> Iterator[BinaryIO]:
    """Open an object; whatever goes wrong while it is parsed becomes a StoreError that names it."""
    with store.open(key) as file:
        try:
            yield file
        except MemoryError as error:  # also pyarrow's, which is one of the errors below
            why = f"it asks for more memory than there is ({one_line(error)}); or this machine is too small for it"
            raise damaged(store, key, why) from error
        except PARSE_ERRORS as error:
            raise damaged(store, key, one_line(error)) from error


def parquet_file(file: BinaryIO, *, check_pages: bool = True) -> pq.ParquetFile:
    """A Parquet file whose pages are checked against their checksums, unless the reader checks all that is in them."""
    return pq.ParquetFile(file, page_checksum_verification=check_pages, pre_buffer=False)


def described(schema: pa.Schema, *, key: str, kind: str, rows: int, units: Mapping[str, str]) -> dict[str, str]:
    """Metadata of a table, without the checksum.

    Raises:
        StoreError: a unit of no column, or a column of floating-point numbers without a unit.
    """
    known = dict(units)
    for field in schema:
        if _holds_floats(field.type) and field.name not in known:
            raise StoreError(f"column {field.name!r} of {kind} has no unit: name one ('1' for a pure number)")
    if unknown := sorted(known.keys() - set(schema.names)):
        raise StoreError(f"units of {kind} name {unknown}, which are not columns: the columns are {schema.names}")
    return {
        "lrpq.schema": str(SCHEMA_VERSION),
        "lrpq.key": key,
        "lrpq.kind": kind,
        "lrpq.creator": f"lrpq {lrpq.__version__}",
        "lrpq.rows": str(rows),
        "lrpq.units": canonical_text(known),
    }


def sealed(schema: pa.Schema, metadata: Mapping[str, str], *, values: bytes = b"") -> pa.Schema:
    """The schema with metadata and checksum; ``values`` is the digest of the columns, if any."""
    plain = pa.schema([pa.field(field.name, _plain_type(field.type), nullable=field.nullable) for field in schema])
    return plain.with_metadata({**metadata, _DIGEST: _seal(plain, metadata, values)})


def metadata_of(schema: pa.Schema, *, key: str, kind: str) -> dict[str, str]:
    """Metadata of a stored table, checked as far as possible before the values are read.

    Raises:
        ValueError: foreign, of another key, kind or format version.
    """
    raw: Mapping[bytes, bytes] = schema.metadata or {}
    found = {name.decode(): text.decode() for name, text in raw.items() if name.startswith(_PREFIX.encode())}
    if _DIGEST not in found or "lrpq.kind" not in found:
        raise ValueError("it was not written by this store")
    if found.get("lrpq.schema") != str(SCHEMA_VERSION):
        raise ValueError(f"its schema is {found.get('lrpq.schema')}, this version reads {SCHEMA_VERSION}")
    if found["lrpq.kind"] != kind:
        raise ValueError(f"it is of kind {found['lrpq.kind']!r}, expected {kind!r}")
    check_written_as(found.get("lrpq.key"), key)
    return found


def verify(schema: pa.Schema, metadata: Mapping[str, str], *, values: bytes = b"") -> None:
    """Compare with the checksum.

    Raises:
        ValueError: names, types, metadata or values are not what was written.
    """
    content = {name: text for name, text in metadata.items() if name != _DIGEST}
    for field in schema:
        if str(field.type) != str(_plain_type(field.type)):  # the checksum does not cover names of list elements
            raise ValueError(f"its column {field.name!r} is of type {field.type}")
    if metadata[_DIGEST] != _seal(schema, content, values):
        raise ValueError("its checksum does not fit its content")


def units_of(table: pa.Table) -> dict[str, str]:
    """Units of the columns of a table that was read from the store."""
    units: dict[str, str] = json.loads(table.schema.metadata[b"lrpq.units"])
    return units


def _seal(schema: pa.Schema, metadata: Mapping[str, str], values: bytes) -> str:
    columns = [[field.name, str(_plain_type(field.type)), field.nullable] for field in schema]
    text = canonical_text({"columns": columns, "metadata": dict(metadata), "values": values.hex()})
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def values_digest(table: pa.Table) -> bytes:
    """SHA-256 over the values, the same however they are chunked, sliced or padded in memory.

    Raises:
        ValueError: a column of a type that the store does not hold.
    """
    digest = hashlib.sha256()
    for name, column in zip(table.column_names, table.columns, strict=True):
        if column.num_chunks == 1:
            array = column.chunk(0)
        else:
            array = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
        _absorb(digest, array, name)
    return digest.digest()


def _absorb(digest: Any, array: pa.Array, name: str) -> None:
    """Lengths and values in a fixed layout: the Arrow buffers themselves depend on offsets and slicing."""
    kind = array.type
    digest.update(f"{_plain_type(kind)} {len(array)} {array.null_count};".encode())
    if array.null_count:
        digest.update(np.packbits(_numbers(pc.is_valid(array))))
    if _is_list(kind):
        if not pa.types.is_fixed_size_list(kind):
            digest.update(_numbers(pc.list_value_length(array).cast(pa.int64()).fill_null(-1)))
        _absorb(digest, array.flatten(), name)
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        wide = array.cast(pa.large_string())
        digest.update(_numbers(pc.binary_length(wide).fill_null(-1)))
        digest.update(b"".join(_chunks(wide.cast(pa.large_binary()))))
    elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        wide = array.cast(pa.large_binary())
        digest.update(_numbers(pc.binary_length(wide).fill_null(-1)))
        digest.update(b"".join(_chunks(wide)))
    elif pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind):
        digest.update(_numbers(array.drop_null()))
    else:
        raise ValueError(f"column {name!r} is of type {kind}; the store holds numbers, booleans, text, bytes and lists")


def _chunks(array: pa.Array) -> Iterator[bytes]:
    for value in array:
        if value.is_valid:
            yield value.as_py()


def _numbers(array: pa.Array) -> Any:
    return np.ascontiguousarray(array.to_numpy(zero_copy_only=False))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _plain_type(kind: pa.DataType) -> pa.DataType:
    """The type with Parquet's own name for list elements, whatever the caller's was."""
    if not _is_list(kind):
        return kind
    element = pa.field("element", _plain_type(kind.value_type), nullable=kind.value_field.nullable)
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(element, kind.list_size)
    return pa.large_list(element) if pa.types.is_large_list(kind) else pa.list_(element)


def _holds_floats(kind: pa.DataType) -> bool:
    while _is_list(kind):
        kind = kind.value_type
    return bool(pa.types.is_floating(kind))
