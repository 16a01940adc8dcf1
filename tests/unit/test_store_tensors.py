"""Tensors and symmetric matrices come back bit for bit, verified, and only what was asked for is read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrpq.errors import StoreError
from tasks.store.host_threads import host_threads, set_host_threads
from tasks.store.objects import ObjectStore, open_store, record_of
from tasks.store.symmetric import TILES_PER_GROUP, symmetric_index
from tasks.store.tensors import read_metadata, read_symmetric, read_tensors, write_symmetric, write_tensors
from tasks.store.tiles import TILE
from tasks.upper_triangle import STRIP, WHOLE, Band, UpperTriangle, packed

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64,
    torch.int32,
    torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool,
]  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(str(tmp_path))


class CountingStore:
    """A store that counts the bytes its readers take."""

    def __init__(self, inner: ObjectStore) -> None:
        self.inner, self.url, self.num_bytes = inner, inner.url, 0

    def open(self, key: str) -> BinaryIO:
        file, counter = self.inner.open(key), self

        class Counting:
            closed = False

            def read(self, size: int = -1) -> bytes:
                content = file.read(size)
                counter.num_bytes += len(content)
                return content

            def readinto(self, buffer: bytearray) -> int:
                count: int = file.readinto(buffer)  # type: ignore[attr-defined]
                counter.num_bytes += count
                return count

            def __enter__(self) -> Counting:
                return self

            def __exit__(self, *error: object) -> None:
                file.close()

            def __getattr__(self, name: str) -> object:
                return getattr(file, name)

        return Counting()  # type: ignore[return-value]


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def random_bits(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    count = math.prod(shape)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    raw = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def test_all_dtypes_and_shapes_come_back_bit_for_bit(store: ObjectStore) -> None:
    shapes = [(), (0,), (3,), (2, 0, 3), (5, 7)]
    tensors = {f"{dtype}|{shape}": random_bits(dtype, shape) for dtype in DTYPES for shape in shapes}
    write_tensors(store, "t.safetensors", tensors, {"bits": "3", "note": "ü\n"})
    found = read_tensors(store, "t.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(found[name]) == bits(tensor), name
    assert read_metadata(store, "t.safetensors") == {"bits": "3", "note": "ü\n"}
    found[f"{torch.float32}|(3,)"][0] = 1.0  # writable


def test_the_safetensors_package_reads_what_is_written(store: ObjectStore, tmp_path: Path) -> None:
    tensors = {
        "b": torch.arange(6).reshape(2, 3),
        "a": torch.tensor([1.5, -0.0], dtype=torch.bfloat16),
        "c": torch.zeros(()),
    }
    write_tensors(store, "t.safetensors", tensors, {"k": "v"})
    theirs = safetensors.torch.load_file(tmp_path / "t.safetensors")
    assert theirs.keys() == tensors.keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in tensors.items())


def test_views_and_parameters_are_written_as_what_they_show(store: ObjectStore) -> None:
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    tensors = {"t": base.T, "s": base[:, 1:3], "p": torch.nn.Parameter(base), "e": base[:1].expand(5, 4)}
    write_tensors(store, "t.safetensors", tensors)
    found = read_tensors(store, "t.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_the_same_content_gives_the_same_bytes(store: ObjectStore) -> None:
    tensors = {name: random_bits(torch.float32, (4, 4), seed) for seed, name in enumerate("abc")}
    metadata = {str(index): "x" for index in range(20)}
    write_tensors(store, "1.safetensors", tensors, metadata)
    one = record_of(store, "1.safetensors")
    turned = dict(reversed(metadata.items()))
    store.delete("1.safetensors")
    write_tensors(store, "1.safetensors", {name: tensors[name].T.contiguous().T for name in "cab"}, turned)
    assert record_of(store, "1.safetensors") == one


def test_only_the_tensors_asked_for_are_read(store: ObjectStore) -> None:
    write_tensors(store, "t.safetensors", {name: torch.ones(100_000) for name in "abcd"})
    counting = CountingStore(store)
    found = read_tensors(counting, "t.safetensors", ["c", "a"])  # type: ignore[arg-type]
    assert list(found) == ["c", "a"]
    assert 800_000 <= counting.num_bytes < 802_000
    with pytest.raises(StoreError, match=r"t\.safetensors in .* has no tensor 'x': it has a, b, c, d"):
        read_tensors(store, "t.safetensors", ["a", "x"])


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"a": torch.zeros(2, dtype=torch.complex64)}, {}),
        ({"a": torch.zeros(2, 2).to_sparse()}, {}),
        ({"a": torch.zeros(2, device="meta")}, {}),
        ({"__metadata__": torch.zeros(2)}, {}),
        ({"a": torch.zeros(2)}, {"lrpq.schema": "2"}),
        ({"a": torch.zeros(2)}, {"sha256:a": ""}),
        ({"a": torch.zeros(2)}, {"n": 3}),
    ],
)
def test_what_cannot_be_held_is_refused_before_anything_is_written(
    store: ObjectStore, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    with pytest.raises(StoreError, match=r"cannot write t\.safetensors"):
        write_tensors(store, "t.safetensors", tensors, metadata)
    assert not store.exists("t.safetensors")


def test_damage_is_found_where_it_is_read(store: ObjectStore, tmp_path: Path) -> None:
    write_tensors(store, "t.safetensors", {"a": torch.ones(8), "b": torch.ones(8)})
    path = tmp_path / "t.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1  # in b
    path.write_bytes(raw)
    assert torch.equal(read_tensors(store, "t.safetensors", ["a"])["a"], torch.ones(8))
    for names in (None, ["b"]):
        with pytest.raises(
            StoreError, match=r"^t\.safetensors in .*checksum of tensor 'b'.*; delete it and run again$"
        ):
            read_tensors(store, "t.safetensors", names)


def test_bytes_after_the_last_tensor_are_refused(store: ObjectStore, tmp_path: Path) -> None:
    write_tensors(store, "t.safetensors", {"a": torch.ones(8)})
    with (tmp_path / "t.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(StoreError, match="holds 33 bytes of tensors, expected 32"):
        read_tensors(store, "t.safetensors")


def test_foreign_files_are_refused(store: ObjectStore, tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(8)}, tmp_path / "t.safetensors", {"k": "v"})
    with pytest.raises(StoreError, match="not written by this store"):
        read_tensors(store, "t.safetensors")
    for content in [b"", b"\xff" * 8, b"\x02" + b"\0" * 7 + b"{}", b"\x02" + b"\0" * 7 + b"[]"]:
        (tmp_path / "x.safetensors").write_bytes(content)
        with pytest.raises(StoreError, match=r"x\.safetensors in .* is damaged"):
            read_tensors(store, "x.safetensors")


def symmetric(width: int, seed: int = 0) -> Tensor:
    values = torch.randn(width, width, generator=torch.Generator().manual_seed(seed))
    return values.triu() + values.triu(1).T


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([1, 2, TILE - 1, TILE, TILE + 1, 2 * TILE, 2 * TILE + 17]), st.integers(0, 5))
def test_symmetric_matrices_come_back_bit_for_bit(width: int, seed: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        store = open_store(folder)
        matrix = symmetric(width, seed)
        write_symmetric(store, "h.parquet", {"x": matrix}, {"x": {"tokens": 128, "weight_sum": 0.1}})
        found, scalars = read_symmetric(store, "h.parquet", "x")
        assert found.dtype == torch.float32
        assert bits(found) == bits(matrix)
        assert scalars == {"tokens": 128, "weight_sum": 0.1}


def test_signed_zeros_nan_and_infinities_survive_and_the_lower_triangle_is_the_mirror(store: ObjectStore) -> None:
    matrix = torch.full((TILE + 2, TILE + 2), -0.0)
    matrix[0, 1], matrix[1, 2], matrix[3, TILE + 1] = math.nan, -math.inf, 1e-45
    matrix[5, 0] = 7.0  # below the diagonal: not looked at
    write_symmetric(store, "h.parquet", {"x": matrix})
    found, scalars = read_symmetric(store, "h.parquet", "x")
    upper = torch.triu_indices(TILE + 2, TILE + 2)
    assert bits(found[upper[0], upper[1]]) == bits(matrix[upper[0], upper[1]])
    assert bits(found) == bits(found.T)
    assert scalars == {}


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ObjectStore, Path, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("several")
    store = open_store(str(folder))
    matrices = {"b": symmetric(40), "a": symmetric(4 * TILE - 3, 1), "c": symmetric(TILE + 1, 2)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tasks.store.symmetric.TILES_PER_GROUP", 6)  # the 10 tiles of "a" are two row groups
        write_symmetric(store, "h.parquet", matrices, {"c": {"tokens": 5}}, unit="nats")
        yield store, folder / "h.parquet", matrices


def test_the_layout_is_what_the_design_says(several: tuple[ObjectStore, Path, dict[str, Tensor]]) -> None:
    _, path, matrices = several
    parquet = pq.ParquetFile(path)
    assert str(parquet.schema_arrow.field("values").type).startswith("fixed_size_list<element: float")
    assert parquet.schema_arrow.field("values").type.list_size == TILE * TILE
    groups = [parquet.metadata.row_group(index) for index in range(parquet.num_row_groups)]
    assert [group.num_rows for group in groups] == [6, 4, 1, 3]
    assert TILES_PER_GROUP * groups[0].total_byte_size / 6 <= 16_000_000
    third = parquet.read_row_group(3).to_pylist()  # of c
    assert [(row["name"], row["tile_row"], row["tile_column"]) for row in third] == [
        ("c", 0, 0),
        ("c", 0, 1),
        ("c", 1, 1),
    ]
    tiles = [np.array(row["values"], dtype=np.float32).reshape(TILE, TILE) for row in third]
    c = matrices["c"].numpy()
    assert np.array_equal(tiles[0], np.triu(c[:TILE, :TILE]))
    assert np.array_equal(tiles[1][:, :1], c[:TILE, TILE:])
    assert not tiles[1][:, 1:].any()
    assert tiles[2][0, 0] == c[TILE, TILE]
    assert np.count_nonzero(tiles[2]) == 1


def test_one_matrix_is_read_without_the_others(several: tuple[ObjectStore, Path, dict[str, Tensor]]) -> None:
    store, path, matrices = several
    for name, matrix in matrices.items():
        found, _ = read_symmetric(store, "h.parquet", name)
        assert torch.equal(found, matrix)
    counting = CountingStore(store)
    read_symmetric(counting, "h.parquet", "c")  # type: ignore[arg-type]
    assert counting.num_bytes < path.stat().st_size / 4
    index = symmetric_index(store, "h.parquet")
    assert dict(index.widths) == {"a": 4 * TILE - 3, "b": 40, "c": TILE + 1}
    assert index.scalars["c"] == {"tokens": 5}
    with pytest.raises(StoreError, match=r"h\.parquet in .* has no matrix 'x': it has a, b, c"):
        read_symmetric(store, "h.parquet", "x")


def test_the_same_matrices_give_the_same_bytes(store: ObjectStore) -> None:
    matrices = {"a": symmetric(700), "b": symmetric(30)}
    write_symmetric(store, "1.parquet", matrices, {"a": {"x": 1.0, "y": 2.0}, "b": {}})
    one = record_of(store, "1.parquet")
    turned = {"b": matrices["b"].T, "a": matrices["a"].T.contiguous()}
    store.delete("1.parquet")
    write_symmetric(store, "1.parquet", turned, {"a": {"y": 2.0, "x": 1.0}})
    assert record_of(store, "1.parquet") == one


@pytest.mark.parametrize(
    ("matrices", "scalars"),
    [
        ({"a": torch.zeros(2, 3)}, {}),
        ({"a": torch.zeros(4)}, {}),
        ({"a": torch.zeros(0, 0)}, {}),
        ({"a": torch.zeros(2, 2, dtype=torch.float64)}, {}),
        ({"a": torch.zeros(2, 2)}, {"b": {"x": 1.0}}),
        ({"a": torch.zeros(2, 2)}, {"a": {"x": math.nan}}),
        ({"a": torch.zeros(2, 2)}, {"a": {"x": "1"}}),
    ],
)
def test_what_is_no_symmetric_matrix_is_refused(
    store: ObjectStore, matrices: dict[str, Tensor], scalars: dict[str, dict[str, float]]
) -> None:
    with pytest.raises(StoreError, match=r"cannot write h\.parquet"):
        write_symmetric(store, "h.parquet", matrices, scalars)
    assert not store.exists("h.parquet")


def test_a_changed_tile_or_index_is_found(store: ObjectStore, tmp_path: Path) -> None:
    write_symmetric(store, "h.parquet", {"x": symmetric(5)}, {"x": {"tokens": 1}})
    path = tmp_path / "h.parquet"
    table = pq.read_table(path)
    values = np.array(table["values"].to_pylist(), dtype=np.float32)
    values[0, 3] = np.nextafter(values[0, 3], 1)
    column = table.schema.get_field_index("values")
    changed = table.set_column(
        column, table.schema.field("values"), pa.array(list(values), table.schema.field("values").type)
    )
    path.unlink()
    pq.write_table(changed, path)
    with pytest.raises(StoreError, match=r"checksum of tile \(0, 0\) of matrix 'x'"):
        read_symmetric(store, "h.parquet", "x")
    index = json.loads(table.schema.metadata[b"lrpq.matrices"])
    index[0]["scalars"]["tokens"] = 2
    metadata = {
        **table.schema.metadata,
        b"lrpq.matrices": json.dumps(index, separators=(",", ":"), sort_keys=True).encode(),
    }
    path.unlink()
    pq.write_table(table.replace_schema_metadata(metadata), path)
    with pytest.raises(StoreError, match="checksum"):
        read_symmetric(store, "h.parquet", "x")


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("width", [600, 2500])
def test_a_matrix_in_two_bands_is_read_as_one(tmp_path: Path, width: int, threads: int) -> None:
    """Whole or packed; beside other matrices, from either object first, and never without one of them."""
    store = open_store(str(tmp_path))
    matrix, other = symmetric(width), symmetric(300)
    scalars = {"x": {"tokens": 128.0}, "y": {"tokens": 1.0}}
    bands = (Band(0, 1, 2), Band(1, 2, 2))
    write_symmetric(store, "a", {"x": matrix, "y": other}, scalars, bands={"x": bands[0]})
    triangle = UpperTriangle(packed(matrix, bands[1]), bands[1]) if width > STRIP else matrix
    write_symmetric(store, "b", {"x": triangle}, {"x": scalars["x"]}, bands={"x": bands[1]})
    write_symmetric(store, "whole", {"x": matrix, "y": other}, scalars)
    index = symmetric_index(store, "a")
    assert index.bands == {"x": bands[0], "y": WHOLE}
    assert index.widths == symmetric_index(store, "whole").widths
    before = host_threads()
    set_host_threads(threads)
    try:
        for first, second in (("a", "b"), ("b", "a")):
            found, numbers = read_symmetric(store, first, "x", rest=[second])
            assert torch.equal(found, matrix)
            assert numbers == scalars["x"]
        assert torch.equal(read_symmetric(store, "a", "x", lower=False, rest=["b"])[0], matrix.triu())
        assert torch.equal(read_symmetric(store, "a", "y")[0], other)
        with pytest.raises(StoreError, match=r"in several objects, of which a .*places 1 of 2 are in none"):
            read_symmetric(store, "a", "x")
        with pytest.raises(StoreError, match=r"a in .* has places 0 of 2 .*expected 1 of 2"):
            read_symmetric(store, "a", "x", rest=["a"])
        with pytest.raises(StoreError, match=r"whole in .* has places 0 of 1 .*expected 1 of 2"):
            read_symmetric(store, "a", "x", rest=["whole"])
        with pytest.raises(StoreError, match="no object c"):
            read_symmetric(store, "a", "x", rest=["c"])
    finally:
        set_host_threads(before)
    write_symmetric(store, "wider", {"x": symmetric(width + 1)}, {"x": scalars["x"]}, bands={"x": bands[1]})
    with pytest.raises(StoreError, match=f"{width + 1} wide: expected 1 of 2, {width} wide"):
        read_symmetric(store, "a", "x", rest=["wider"])
