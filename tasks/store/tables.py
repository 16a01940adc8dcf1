"""Tables as Parquet objects: scores, costs, tokens, plans."""

from __future__ import annotations

from collections.abc import Mapping
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from lrpq.errors import StoreError
from tasks.store.objects import ObjectStore, one_line
from tasks.store.schema import (
    described,
    metadata_of,
    opened,
    parquet_file,
    sealed,
    units_of,
    values_digest,
    verify,
)

__all__ = ["read_table", "units_of", "write_table"]

_ROWS_PER_GROUP = 1_000_000


def write_table(
    store: ObjectStore,
    key: str,
    columns: pa.Table | Mapping[str, object],
    *,
    units: Mapping[str, str],
    kind: str,
) -> None:
    """Publish a table, or leave the one that is there; the same content always gives the same bytes.

    ``columns`` is a table or maps names to sequences, NumPy or Arrow arrays. ``units`` names the unit of
    every column of floating-point numbers (``nats``, ``bit``, ``s``; ``1`` for a pure number) and of any
    other that has one.

    Raises:
        StoreError: columns of different lengths or of a type the store does not hold, a missing unit, a
            failed write.
    """
    try:
        table = (columns if isinstance(columns, pa.Table) else pa.table(dict(columns))).combine_chunks()
        values = values_digest(table)
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise StoreError(
            f"cannot write {key}: the columns of {kind} make no table for the store: {one_line(error)}"
        ) from error
    if len(set(table.column_names)) != table.num_columns or not table.num_columns:
        raise StoreError(f"cannot write {key}: {kind} needs columns with different names, got {table.column_names}")
    metadata = described(table.schema, key=key, kind=kind, rows=table.num_rows, units=units)
    schema = sealed(table.schema, metadata, values=values)

    def write(file: BinaryIO) -> None:
        pq.write_table(
            table.cast(schema).replace_schema_metadata(schema.metadata),
            file,
            row_group_size=_ROWS_PER_GROUP,
            compression="zstd",
            write_page_checksum=True,
        )

    store.publish(key, write)


def read_table(store: ObjectStore, key: str, kind: str) -> pa.Table:
    """The table as it was written.

    Raises:
        StoreError: no such object, or it is truncated, changed, foreign or of another kind.
    """
    with opened(store, key) as file:
        parquet = parquet_file(file)
        metadata = metadata_of(parquet.schema_arrow, key=key, kind=kind)
        if metadata.get("lrpq.rows") != str(parquet.metadata.num_rows):
            raise ValueError(f"it has {parquet.metadata.num_rows} rows, expected {metadata.get('lrpq.rows')}")
        table = parquet.read(use_threads=False)
        table.validate(full=True)
        verify(table.schema, metadata, values=values_digest(table))
        return table.replace_schema_metadata(metadata)  # and nothing that the checksum does not cover
