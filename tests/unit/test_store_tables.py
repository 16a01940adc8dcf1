"""Tables come back as they were written, or not at all."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrpq.errors import StoreError
from tasks.store.objects import ObjectStore, open_store
from tasks.store.schema import values_digest
from tasks.store.tables import read_table, units_of, write_table

COLUMNS = {
    "name": ["model.layers.0.q_proj", "ü", "", None],
    "block": np.array([0, 1, 2, -3], dtype=np.int32),
    "cost": np.array([0.1, -0.0, math.inf, math.nan]),
    "half": pa.array(np.array([1, 2, 3, 4], dtype=np.float16)),
    "maybe": pa.array([1.5, None, None, 2.5], pa.float32()),
    "kept": [True, False, None, True],
    "raw": [b"\x00\xff", b"", None, b"x"],
    "tokens": pa.array([[1, 2, 3], [4, 5, 6], [7, 8, 9], [0, 0, 0]], pa.list_(pa.int32(), 3)),
    "ragged": [[1.0], [], None, [2.0, None]],
    "nested": [[["a"], []], [], [["b", None]], [[]]],
}
UNITS = {"cost": "nats", "half": "1", "maybe": "bit", "ragged": "s", "block": "index"}


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(str(tmp_path))


def test_every_type_comes_back_exactly(store: ObjectStore) -> None:
    write_table(store, "t.parquet", COLUMNS, units=UNITS, kind="costs")
    table = read_table(store, "t.parquet", "costs")
    expected = pa.table(COLUMNS)
    assert table.column_names == expected.column_names
    for name in expected.column_names:
        assert repr(table[name].to_pylist()) == repr(expected[name].to_pylist()), name  # repr: nan, -0.0
    assert table.schema.field("half").type == pa.float16()
    assert table.schema.field("tokens").type.list_size == 3
    assert units_of(table) == UNITS


def test_what_the_object_says_of_itself_can_be_read_without_this_package(store: ObjectStore, tmp_path: Path) -> None:
    write_table(store, "t.parquet", COLUMNS, units=UNITS, kind="costs")
    metadata = pq.read_schema(tmp_path / "t.parquet").metadata
    assert (metadata[b"lrpq.schema"], metadata[b"lrpq.key"]) == (b"2", b"t.parquet")
    assert metadata[b"lrpq.kind"] == b"costs"
    assert metadata[b"lrpq.rows"] == b"4"
    assert metadata[b"lrpq.creator"].startswith(b"lrpq ")
    assert b'"cost":"nats"' in metadata[b"lrpq.units"]
    assert len(metadata[b"lrpq.sha256"]) == 64
    assert pq.read_table(tmp_path / "t.parquet").num_rows == 4


def test_the_same_content_gives_the_same_bytes_however_it_lies_in_memory(store: ObjectStore) -> None:
    table = pa.table(COLUMNS)
    padded = pa.concat_tables([table, table, table]).slice(4, 4)
    chunked = pa.concat_tables([table.slice(0, 1), table.slice(1, 0), table.slice(1, 3)])
    annotated = table.replace_schema_metadata({"pandas": "written on Monday"})
    versions = [table, COLUMNS, padded, chunked, annotated]
    records = []
    for index, version in enumerate(versions):
        store.delete("t.parquet")
        units = dict(sorted(UNITS.items(), reverse=bool(index % 2)))
        records.append(write_table(store, "t.parquet", version, units=units, kind="k"))
    assert records == [records[0]] * len(versions)
    read = read_table(store, "t.parquet", "k")
    store.delete("t.parquet")
    assert write_table(store, "t.parquet", read, units=units_of(read), kind="k") == records[0]


Numbers = st.lists(st.none() | st.floats(width=32), max_size=6)
Texts = st.lists(st.none() | st.text(max_size=3), max_size=6)
Lists = st.lists(st.none() | st.lists(st.none() | st.integers(0, 3), max_size=3), max_size=6)


@given(
    st.sampled_from([pa.float32(), pa.string(), pa.list_(pa.int8())]).flatmap(
        lambda kind: st.tuples(
            st.just(kind), *[Numbers if kind == pa.float32() else Texts if kind == pa.string() else Lists] * 2
        )
    ),
    st.integers(0, 3),
)
def test_the_digest_tells_contents_apart_and_nothing_else(
    case: tuple[pa.DataType, list[object], list[object]], offset: int
) -> None:
    kind, a, b = case
    one, other = pa.array(a, kind), pa.array(b, kind)
    sliced = pa.concat_arrays([other[:0], pa.array(b[::-1] + b, kind)])[len(b) :]
    digests = [values_digest(pa.table({"x": values})) for values in (one, other, sliced)]
    assert digests[1] == digests[2]
    assert (digests[0] == digests[1]) == (repr(one.to_pylist()) == repr(other.to_pylist()))


def test_the_digest_knows_where_the_nulls_are() -> None:
    lists = [[None, 1, 1], [1, None, 1], [1, 1, None], [1, 1], [None, 1, 1, None]]
    assert len({values_digest(pa.table({"x": pa.array(values, pa.int8())})) for values in lists}) == len(lists)


def test_empty_tables_and_many_rows(store: ObjectStore) -> None:
    write_table(store, "empty.parquet", {"x": pa.array([], pa.float64())}, units={"x": "1"}, kind="k")
    assert read_table(store, "empty.parquet", "k").num_rows == 0
    many = np.arange(1_500_000, dtype=np.int32)  # more than one row group
    write_table(store, "many.parquet", {"x": many}, units={}, kind="k")
    assert np.array_equal(read_table(store, "many.parquet", "k")["x"].to_numpy(), many)


@pytest.mark.parametrize(
    ("columns", "units", "message"),
    [
        ({"x": [1.0]}, {}, "column 'x' of k has no unit"),
        ({"x": [[1.0]]}, {}, "column 'x' of k has no unit"),
        ({"x": [1]}, {"y": "s"}, r"units of k name \['y'\]"),
        ({"x": [1], "y": [1, 2]}, {}, "make no table"),
        ({"x": [1, "a"]}, {}, "make no table"),
        ({"x": [{"a": 1}]}, {}, "column 'x' is of type struct"),
        ({"x": pa.array(["a"]).dictionary_encode()}, {}, "column 'x' is of type dictionary"),
        ({}, {}, "needs columns"),
        (pa.table([[1], [2]], names=["x", "x"]), {}, "different names"),
    ],
)
def test_what_makes_no_table_is_refused_before_anything_is_written(
    store: ObjectStore, columns: object, units: dict[str, str], message: str
) -> None:
    with pytest.raises(StoreError, match=message) as caught:
        write_table(store, "t.parquet", columns, units=units, kind="k")
    assert "\n" not in str(caught.value)
    assert not store.exists("t.parquet")


def rewritten(path: Path, change: object) -> None:
    """Replace the file by a valid Parquet file with a changed table and the old metadata."""
    table = pq.read_table(path)
    changed = change(table)  # type: ignore[operator]
    path.unlink()
    pq.write_table(changed, path)


def metadata_with(**changes: str) -> object:
    return lambda table: table.replace_schema_metadata(
        {**table.schema.metadata, **{f"lrpq.{name}".encode(): text.encode() for name, text in changes.items()}}
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.set_column(1, "block", pa.array([0, 1, 2, -4], pa.int32())), "checksum"),
        (lambda table: table.set_column(1, "block", pa.array([0, 1, 2, -3], pa.int64())), "checksum"),
        (
            lambda table: table.rename_columns(["n", *table.column_names[1:]]).replace_schema_metadata(
                table.schema.metadata
            ),
            "checksum",
        ),
        (lambda table: table.slice(0, 3), "it has 3 rows, expected 4"),
        (lambda table: table.select(table.column_names[1:]), "checksum"),
        (lambda table: table.replace_schema_metadata(None), "not written by this store"),
        (metadata_with(units='{"cost":"bit"}'), "checksum"),
        (metadata_with(creator="lrpq 9"), "checksum"),
        (metadata_with(extra="x"), "checksum"),
        (metadata_with(schema="1"), "its schema is 1, this version reads 2"),
        (metadata_with(key="other/t.parquet"), 'it is the object "other/t.parquet"'),
        (metadata_with(kind="scores"), "kind 'scores', expected 'costs'"),
    ],
)
def test_a_reader_names_the_object_and_what_is_wrong(
    store: ObjectStore, tmp_path: Path, change: object, message: str
) -> None:
    write_table(store, "a/t.parquet", COLUMNS, units=UNITS, kind="costs")
    rewritten(tmp_path / "a" / "t.parquet", change)
    with pytest.raises(StoreError, match=rf"^a/t\.parquet in .*{message}.*; delete it and run again$"):
        read_table(store, "a/t.parquet", "costs")
