"""Symmetric float32 matrices (Hessians) as Parquet: tiles of the upper triangle, streamed.

One row a tile of 256 x 256, in the order (0,0), (0,1), ..., (1,1), ...; edge tiles and the lower half of the
tiles on the diagonal are zeros. A row group holds tiles of one matrix only, so a reader of one matrix reads
nothing else. Of a matrix that is cut into bands (tasks.upper_triangle) an object has the tiles of one band; the others
are in objects of their own. Every tile has its own checksum; the names, widths and scalars of all matrices are in the
metadata, under the checksum of schema.py. Memory beyond the matrix itself: some row groups (docs/log.md) for
every thread of host_threads.py, whatever its width.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from lrpq.errors import StoreError
from tasks.store.documents import canonical_text, plain_json
from tasks.store.host_threads import host_threads, in_order
from tasks.store.objects import ObjectStore
from tasks.store.row_groups import write_row_groups
from tasks.store.schema import described, metadata_of, opened, parquet_file, sealed, verify
from tasks.store.tiles import TILE, gather, scatter
from tasks.upper_triangle import STRIP, WHOLE, Band, Triangle

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy.typing import NDArray

TILES_PER_GROUP = 60
"""Tiles of 2^18 bytes, so that a row group stays below 16 MB: readers and writers hold several copies of two.

Smaller tiles hold less padding (a matrix of 576 a third less than in tiles of 512), larger ones are fewer."""
KIND = "symmetric"
_MATRICES = "lrpq.matrices"
_MAX_GROUP_BYTES = 16_000_000
MOST_PLACES = 64
"""Of bands of a matrix."""

_SCHEMA = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("tile_row", pa.int32(), nullable=False),
        pa.field("tile_column", pa.int32(), nullable=False),
        pa.field("sha256", pa.binary(32), nullable=False),
        pa.field("values", pa.list_(pa.field("element", pa.float32(), nullable=False), TILE * TILE), nullable=False),
    ]
)
# Measured on 60 tiles of normal numbers, one core: zstd on split byte streams 250 MB/s written, 550 read, 16%
# smaller; uncompressed 110 to 350 written. The padding zeros vanish.
_WRITER = {
    "compression": "zstd",
    "use_dictionary": ["name"],
    "column_encoding": {"values.list.element": "BYTE_STREAM_SPLIT"},
    "write_statistics": False,
    "write_page_checksum": True,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SymmetricIndex:
    """What an object of symmetric matrices holds."""

    widths: Mapping[str, int]
    """Width of every matrix, in the order of the object."""
    scalars: Mapping[str, Mapping[str, float]]
    """Named numbers that belong to a matrix, such as its token count."""
    bands: Mapping[str, Band]
    """Which part of a matrix the object holds."""


def write_symmetric(
    store: ObjectStore,
    key: str,
    matrices: Mapping[str, Float[Tensor, "d d"] | Triangle],
    scalars: Mapping[str, Mapping[str, float]] | None = None,
    *,
    bands: Mapping[str, Band] | None = None,
    unit: str = "1",
) -> None:
    """Publish symmetric float32 matrices of any device; only their upper triangles are looked at, or are there.

    Of the matrices in ``bands`` a band alone is stored, and only that needs to be there. ``unit`` is that of the
    values. The mapping is asked for one matrix at a time, twice (width, values), so
    it may load them lazily. The same content gives the same bytes.

    Raises:
        StoreError: not a square float32 matrix, scalars of no matrix or not finite, a failed write.
    """
    widths = {name: _width(key, name, matrices[name]) for name in sorted(matrices)}
    numbers = {name: dict((scalars or {}).get(name, {})) for name in widths}
    if unknown := sorted((scalars or {}).keys() - widths.keys()):
        raise StoreError(f"cannot write {key}: scalars of {unknown[0]!r}, which is none of its matrices")
    for name, items in numbers.items():
        for item, value in items.items():
            if not _is_scalar(value):
                raise StoreError(
                    f"cannot write {key}: scalar {item!r} of {name!r} is {value!r}, expected a finite number"
                )
    parts = {name: (bands or {}).get(name, WHOLE) for name in widths}
    index = [
        {
            "name": name,
            "width": width,
            "scalars": numbers[name],
            **({} if parts[name] == WHOLE else {"band": list(parts[name])}),
        }
        for name, width in widths.items()
    ]
    rows = sum(_num_tiles(width, parts[name]) for name, width in widths.items())
    metadata = described(_SCHEMA, key=key, kind=KIND, rows=rows, units={"values": unit})
    metadata[_MATRICES] = canonical_text(plain_json(index, where=key))
    schema = sealed(_SCHEMA, metadata)

    def write(file: BinaryIO) -> None:
        write_row_groups(file, schema, _tables(schema, matrices, widths, parts), _WRITER)

    store.publish(key, write)


def _tables(
    schema: pa.Schema,
    matrices: Mapping[str, Tensor | Triangle],
    widths: Mapping[str, int],
    bands: Mapping[str, Band],
) -> Iterator[Callable[[], pa.Table]]:
    """The row groups of all matrices, each made when it is called, in memory that its thread's next one takes over."""
    memory = _Memory()
    for name, width in widths.items():
        matrix = matrices[name]
        for group in _groups(width, bands[name]):
            yield partial(_group_table, schema, name, matrix, group, width=width, memory=memory)


class _Memory(threading.local):
    """Tiles of a row group, of every thread its own: of fresh ones the system clears each page first, for one thread
    of a process at a time."""

    def __init__(self) -> None:
        self.tiles = np.empty((TILES_PER_GROUP, TILE, TILE), dtype=np.float32)


def symmetric_index(store: ObjectStore, key: str) -> SymmetricIndex:
    """Names, widths and scalars; no matrix is read.

    Raises:
        StoreError: no such object, or it is truncated, changed or foreign.
    """
    with opened(store, key) as file:
        return _index(parquet_file(file), key)


def read_symmetric(
    store: ObjectStore, key: str, name: str, *, lower: bool = True, rest: Sequence[str] = ()
) -> tuple[Float[Tensor, "d d"], dict[str, float]]:
    """One matrix (float32, CPU, exactly symmetric; without ``lower`` its upper triangle) and its scalars.

    Only the matrix's own row groups are read, and every tile is verified. Of a matrix that is cut into bands, ``rest``
    are the objects of those that ``key`` does not hold.

    Raises:
        StoreError: no such object, no such matrix, or an object is truncated, changed or foreign, or not of the bands
            that are missing.
    """
    found: _Matrix | None = None
    for part in (key, *rest):
        with opened(store, part) as file:
            parquet = _tiles(file)
            index = _index(parquet, part)
            if name not in index.widths:
                raise StoreError(f"{part} in {store.url} has no matrix {name!r}: it has {', '.join(index.widths)}")
            if found is None:
                found = _Matrix.of(index, name)
            found.check(index, store=store, key=part)
            _read_band(store, part, parquet, index, name, found.values, lower=lower)
    assert found is not None
    if found.missing:
        raise StoreError(
            f"matrix {name!r} is in several objects, of which {key} in {store.url} is one; places "
            f"{_listed(found.missing)} of {found.count} are in none of those that were read: "
            f"{', '.join((key, *rest))}"
        )
    return torch.from_numpy(found.values), found.scalars


@dataclass(slots=True, kw_only=True)
class _Matrix:
    """A matrix of which bands are read."""

    name: str
    values: NDArray[np.float32]
    scalars: dict[str, float]
    count: int
    missing: set[int]
    """Places of bands."""

    @classmethod
    def of(cls, index: SymmetricIndex, name: str) -> _Matrix:
        width, count = index.widths[name], index.bands[name].total
        if host_threads() == 1:  # zeros that are written: pages come in order, in half the time of the read as a whole
            values = torch.zeros(width, width).numpy()
        else:  # zeros that are not: the threads touch the pages with their tiles
            values = np.zeros((width, width), dtype=np.float32)
        scalars, missing = dict(index.scalars[name]), set(range(count))
        return cls(name=name, values=values, scalars=scalars, count=count, missing=missing)

    def check(self, index: SymmetricIndex, *, store: ObjectStore, key: str) -> None:
        """Count a band as read.

        Raises:
            StoreError: some of it is not missing, or it is of another matrix.
        """
        band = index.bands[self.name]
        same = index.widths[self.name] == len(self.values) and dict(index.scalars[self.name]) == self.scalars
        if not same or band.total != self.count or not self.missing.issuperset(band.places):
            raise StoreError(
                f"{key} in {store.url} has places {_listed(band.places)} of {band.total} of matrix "
                f"{self.name!r}, {index.widths[self.name]} wide: expected {_listed(self.missing)} of "
                f"{self.count}, {len(self.values)} wide, with the same scalars; run the stage that writes it again"
            )
        self.missing.difference_update(band.places)


def _read_band(
    store: ObjectStore,
    key: str,
    parquet: pq.ParquetFile,
    index: SymmetricIndex,
    name: str,
    matrix: NDArray[np.float32],
    *,
    lower: bool,
) -> None:
    first = 0
    for other, other_width in index.widths.items():
        if other == name:
            break
        first += _num_groups(other_width, index.bands[other])
    groups = list(_groups(len(matrix), index.bands[name]))
    for offset, group in enumerate(groups, first):
        shape = parquet.metadata.row_group(offset)
        if shape.num_rows != len(group) or shape.total_byte_size > _MAX_GROUP_BYTES:
            raise ValueError(f"row group {offset} does not fit matrix {name!r}")
    if host_threads() == 1:
        with closing(_read_ahead(parquet, range(first, first + len(groups)))) as tables:
            for group, table in zip(groups, tables, strict=True):
                _place_group(table, name, group, matrix, lower=lower)
    else:
        _read_by_threads(store, key, name, dict(enumerate(groups, first)), matrix, lower=lower)


def _tiles(file: BinaryIO) -> pq.ParquetFile:
    """The pages' own checksums would say again what the tiles' say."""
    return parquet_file(file, check_pages=False)


def _read_by_threads(
    store: ObjectStore,
    key: str,
    name: str,
    groups: Mapping[int, list[tuple[int, int]]],
    matrix: NDArray[np.float32],
    *,
    lower: bool,
) -> None:
    """Row groups by number, each thread with the object opened for itself; their tiles lie nowhere twice."""
    free: SimpleQueue[pq.ParquetFile] = SimpleQueue()

    def place(number: int) -> None:
        parquet = free.get()
        try:
            _place_group(parquet.read_row_group(number, use_threads=False), name, groups[number], matrix, lower=lower)
        finally:
            free.put(parquet)

    with ExitStack() as files:
        for _ in range(host_threads()):
            free.put(_tiles(files.enter_context(store.open(key))))
        with closing(in_order(partial(place, number) for number in groups)) as done:
            for _ in done:
                pass


def _read_ahead(parquet: pq.ParquetFile, groups: range) -> Generator[pa.Table, None, None]:
    """Row groups, each read and decoded while the one before it is verified and put in its place; a thread for that is
    started where there are several."""
    if len(groups) == 1:
        yield parquet.read_row_group(groups[0], use_threads=False)
        return
    with ThreadPoolExecutor(max_workers=1) as reader:
        coming: Future[pa.Table] | None = None
        for group in groups:
            table, coming = coming, reader.submit(parquet.read_row_group, group, use_threads=False)
            if table is not None:
                yield table.result()
        if coming is not None:
            yield coming.result()


def _width(key: str, name: str, matrix: Tensor | Triangle) -> int:
    if isinstance(matrix, Triangle) and matrix.dtype == torch.float32 and matrix.width:
        return matrix.width
    if isinstance(matrix, Triangle):
        raise StoreError(f"cannot write {key}: {name!r} is {matrix.dtype}, expected float32 values")
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.dtype != torch.float32 or not len(matrix):
        raise StoreError(
            f"cannot write {key}: {name!r} is {matrix.dtype} {list(matrix.shape)}, expected a square float32 matrix"
        )
    return len(matrix)


def _groups(width: int, band: Band) -> Iterator[list[tuple[int, int]]]:
    """Tile positions of each row group."""
    count = -(-width // TILE)
    group: list[tuple[int, int]] = []
    for row in (row for row in range(count) if band.has_row(row * TILE)):
        for column in range(row, count):
            group.append((row, column))
            if len(group) == TILES_PER_GROUP:
                yield group
                group = []
    if group:
        yield group


def _num_tiles(width: int, band: Band) -> int:
    count = -(-width // TILE)
    return sum(count - row for row in range(count) if band.has_row(row * TILE))


def _longest_row(width: int, band: Band) -> int:
    """Tiles of the first row of a band, which is that of the strip of its first place."""
    return -(-width // TILE) - band.start * STRIP // TILE


def _num_groups(width: int, band: Band) -> int:
    return -(-_num_tiles(width, band) // TILES_PER_GROUP)


def _group_table(
    schema: pa.Schema,
    name: str,
    matrix: Tensor | Triangle,
    group: list[tuple[int, int]],
    *,
    width: int,
    memory: _Memory,
) -> pa.Table:
    """The row group, as long as nothing else is made in this memory."""
    values = memory.tiles[: len(group)]
    gather(matrix, width, group, values)
    digests = [_digest(name, position, tile) for position, tile in zip(group, values, strict=True)]
    return pa.table(
        [
            pa.array([name] * len(group), pa.string()),
            pa.array([row for row, _ in group], pa.int32()),
            pa.array([column for _, column in group], pa.int32()),
            pa.array(digests, pa.binary(32)),
            pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=schema.field("values").type),
        ],
        schema=schema,
    )


def _place_group(
    table: pa.Table, name: str, group: list[tuple[int, int]], matrix: NDArray[np.float32], *, lower: bool
) -> None:
    table = table.combine_chunks()
    names, rows = table.column("name").to_pylist(), table.column("tile_row").to_pylist()
    columns, digests = table.column("tile_column").to_pylist(), table.column("sha256").to_pylist()
    values = table.column("values").chunk(0).flatten().to_numpy().reshape(-1, TILE, TILE)
    if names != [name] * len(group) or list(zip(rows, columns, strict=True)) != group or len(values) != len(group):
        raise ValueError(f"the tiles of matrix {name!r} are not those expected")
    for (row, column), digest, tile in zip(group, digests, values, strict=True):
        if _digest(name, (row, column), tile) != digest:
            raise ValueError(f"the checksum of tile ({row}, {column}) of matrix {name!r} does not fit its values")
    scatter(values, group, matrix, lower=lower)


def _digest(name: str, position: tuple[int, int], tile: NDArray[np.float32]) -> bytes:
    digest = hashlib.sha256(f"{len(name)} {name} {position[0]} {position[1]};".encode())
    digest.update(np.ascontiguousarray(tile).data)
    return digest.digest()


def _index(parquet: pq.ParquetFile, key: str) -> SymmetricIndex:
    schema = parquet.schema_arrow
    metadata = metadata_of(schema, key=key, kind=KIND)
    verify(schema, metadata)
    widths: dict[str, int] = {}
    scalars: dict[str, Mapping[str, float]] = {}
    bands: dict[str, Band] = {}
    entries = json.loads(metadata.get(_MATRICES, ""))
    for entry in entries if isinstance(entries, list) else [entries]:
        match entry:
            case {"name": str(name), "width": int(width), "scalars": dict(found)} if (
                type(width) is int and width > 0 and name not in widths and all(map(_is_scalar, found.values()))
            ):
                widths[name], scalars[name], bands[name] = width, found, _band(entry.get("band"))
            case _:
                raise ValueError("its list of matrices is malformed")
    for name, width in widths.items():  # before tiles of a width that somebody made up are counted row by row
        if _longest_row(width, bands[name]) > parquet.metadata.num_rows:
            raise ValueError(f"matrix {name!r} cannot be {width} wide: it has {parquet.metadata.num_rows} tiles in all")
    groups = sum(_num_groups(width, bands[name]) for name, width in widths.items())
    if parquet.metadata.num_row_groups != groups or metadata.get("lrpq.rows") != str(parquet.metadata.num_rows):
        raise ValueError(f"it has {parquet.metadata.num_row_groups} row groups, expected {groups}")
    return SymmetricIndex(widths=widths, scalars=scalars, bands=bands)


def _band(entry: object) -> Band:
    """What the index says of a matrix's band, or nothing of a whole one."""
    match entry:
        case None:
            return WHOLE
        case [int(start), int(stop), int(total)] if (
            bool not in map(type, entry) and 0 <= start < stop <= total <= MOST_PLACES
        ):
            return Band(start, stop, total)
        case _:
            raise ValueError("its list of matrices is malformed")


def _listed(places: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(places))) or "none"


def _is_scalar(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
