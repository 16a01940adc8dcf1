"""A Parquet file whose row groups are encoded by several threads: the bytes are those that pyarrow's writer makes.

pyarrow encodes and compresses one row group after the other, on one thread. What it writes of a row group depends on
nothing before it but by the offsets in the file's footer. So every group is written as a file of its own in memory; its
pages are put behind those before it, and the footer is that of the first one with all groups in it, their offsets
counted from where their pages are (parquet-format, parquet.thrift: FileMetaData, RowGroup, ColumnChunk).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.store.host_threads import host_threads, in_order
from tasks.store.thrift import Struct, decode, encode, field

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MAGIC = b"PAR1"
_LENGTH_BYTES = 4
_SLACK_BYTES = 1 << 20
"""Of a file in memory, for levels and headers; beside it twice its values, and its footer with the schema twice."""
# Field ids of parquet.thrift.
_FILE_ROWS, _FILE_GROUPS = 3, 4
_GROUP_COLUMNS, _GROUP_OFFSET, _GROUP_ORDINAL = 1, 5, 7
_COLUMN_OFFSET, _COLUMN_METADATA = 2, 3
_PAGE_OFFSETS = (9, 10, 11)
"""Of data, index and dictionary pages, in the metadata of a column."""


def write_row_groups(
    file: BinaryIO, schema: pa.Schema, tables: Iterator[Callable[[], pa.Table]], options: Mapping[str, Any]
) -> None:
    """Write tables as one row group each, made and encoded by the threads of tasks.store.host_threads.

    Args:
        file: to be written from its beginning.
        schema: of all tables.
        tables: each made when it is called; one at least.
        options: of pyarrow.parquet.ParquetWriter.
    """
    if host_threads() == 1:
        with pq.ParquetWriter(file, schema, **options) as writer:
            for table in tables:
                made = table()
                writer.write_table(made, row_group_size=len(made))
        return
    footer: Struct | None = None
    groups: list[Struct] = []
    at = len(_MAGIC)
    file.write(_MAGIC)
    rows = 0
    free: SimpleQueue[NDArray[np.uint8]] = SimpleQueue()
    calls = ((lambda table=table: _encoded(schema, table, options, free)) for table in tables)
    with closing(in_order(calls)) as encoded:
        for pages, alone, memory in encoded:
            file.write(pages)
            free.put(memory)
            group = field(alone, _FILE_GROUPS)[2][1][0]
            _move(group, at - len(_MAGIC), len(groups))
            groups.append(group)
            rows += field(alone, _FILE_ROWS)[2]
            at += len(pages)
            footer = alone if footer is None else footer
    if footer is None:
        raise ValueError("a file of no row group")
    entry = field(footer, _FILE_GROUPS)
    entry[2] = (entry[2][0], groups)
    field(footer, _FILE_ROWS)[2] = rows
    text = encode(footer)
    file.write(text + len(text).to_bytes(_LENGTH_BYTES, "little") + _MAGIC)


def _encoded(
    schema: pa.Schema,
    table: Callable[[], pa.Table],
    options: Mapping[str, Any],
    free: SimpleQueue[NDArray[np.uint8]],
) -> tuple[memoryview, Struct, NDArray[np.uint8]]:
    """Pages of a table's one row group, the footer of a file that holds nothing else, and the memory that this is in:
    of ``free`` where there is some, for fresh pages have to be cleared for one thread of a process at a time."""
    made = table()
    memory = _memory(2 * made.nbytes + 4 * schema.serialize().size + _SLACK_BYTES, free)
    sink = pa.FixedSizeBufferWriter(pa.py_buffer(memory))
    with pq.ParquetWriter(sink, schema, **options) as writer:
        writer.write_table(made, row_group_size=len(made))
    raw = memory.data[: sink.tell()]
    end = len(raw) - len(_MAGIC) - _LENGTH_BYTES
    start = end - int.from_bytes(raw[end : end + _LENGTH_BYTES], "little")
    return raw[len(_MAGIC) : start], decode(bytes(raw[start:end]))[0], memory


def _memory(num_bytes: int, free: SimpleQueue[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """What is free, if it is large enough; pages of new memory that nobody touches are none."""
    try:
        memory = free.get_nowait()
    except Empty:
        return np.empty(num_bytes, dtype=np.uint8)
    return memory if len(memory) >= num_bytes else np.empty(num_bytes, dtype=np.uint8)


def _move(group: Struct, distance: int, ordinal: int) -> None:
    """Count a group's offsets from the file that it is in now; 0 is none."""
    _shift(group, _GROUP_OFFSET, distance)
    for entry in group:
        if entry[0] == _GROUP_ORDINAL:
            entry[2] = ordinal
    for column in field(group, _GROUP_COLUMNS)[2][1]:
        _shift(column, _COLUMN_OFFSET, distance)
        for number in _PAGE_OFFSETS:
            _shift(field(column, _COLUMN_METADATA)[2], number, distance)


def _shift(fields: Struct, number: int, distance: int) -> None:
    for entry in fields:
        if entry[0] == number and entry[2]:
            entry[2] += distance
