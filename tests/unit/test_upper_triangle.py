"""Matrices that travel as upper triangles: nothing of the triangle is lost, and few bytes of the rest come along."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from tasks import upper_triangle
from tasks.store.host_threads import host_threads, set_host_threads
from tasks.store.opened import open_store
from tasks.store.symmetric import write_symmetric
from tasks.upper_triangle import WHOLE, Band, Sum, Triangle, UpperTriangle, packed, unpacked


@pytest.mark.parametrize("width", [1, 2, 7, 8, 9, 16, 61])
def test_the_upper_triangle_arrives(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upper_triangle, "STRIP", 8)
    matrix = torch.randn(width, width, generator=torch.Generator().manual_seed(width))
    values = packed(matrix)
    assert values.numel() <= width * (width + 8) // 2
    found = unpacked(values)
    assert found.shape == matrix.shape
    assert torch.equal(found.triu(), matrix.triu())


def test_every_width_is_known_by_its_number_of_values() -> None:
    for width in (*range(1, 30), 511, 512, 513, 4096, 28672):
        assert upper_triangle._width(upper_triangle._numel(width)) == width


@pytest.mark.parametrize("ends", [(1,), (1, 2), (1, 2, 3), (3, 5), (1, 4, 5)])
@pytest.mark.parametrize("width", [33, 64, 190])
def test_bands_have_every_strip_once_and_values_by_their_places(
    width: int, ends: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upper_triangle, "STRIP", 8)
    matrix = torch.randn(width, width, generator=torch.Generator().manual_seed(width))
    found = torch.zeros(width, width)
    sizes = {}
    for band in (Band(start, stop, ends[-1]) for start, stop in itertools.pairwise((0, *ends))):
        values = packed(matrix, band)
        triangle = UpperTriangle(values, band)
        assert triangle.width == width
        sizes[band] = values.numel()
        for row in range(width):
            if band.has_row(row):
                assert (found[row] == 0).all()
                triangle.read(slice(row, row + 1), slice(row, width), found.numpy()[row : row + 1, row:])
    assert torch.equal(found, matrix.triu())
    total = packed(matrix, WHOLE).numel()
    assert sum(sizes.values()) == total
    for band, size in sizes.items():
        assert abs(size - total * len(band.places) / band.total) <= 2 * 8 * 8 * band.total  # a few strips' steps


def test_what_is_no_triangle_is_refused() -> None:
    with pytest.raises(ValueError, match="no upper triangle"):
        unpacked(torch.zeros(upper_triangle._numel(600) + 1))


def test_a_packed_triangle_is_stored_as_its_matrix(tmp_path: Path) -> None:
    """The same bytes, for tiles on the diagonal and off it, in several strips, and at edges."""
    matrices = {}
    for width in (1, 255, 513, 1100):
        matrices[f"x{width}"] = torch.randn(width, width, generator=torch.Generator().manual_seed(width))
    triangles = {name: UpperTriangle(packed(matrix)) for name, matrix in matrices.items()}
    stored = []
    for name, found in (("whole", matrices), ("packed", triangles)):
        store = open_store(str(tmp_path / name))
        write_symmetric(store, "h.parquet", found)
        with store.open("h.parquet") as file:
            stored.append(file.read())
    assert stored[0] == stored[1]


@pytest.mark.parametrize("threads", [1, 3])
def test_a_sum_is_stored_as_the_added_matrices(tmp_path: Path, threads: int) -> None:
    """Bits of the same tree, though nothing is added before a tile is read; whole and in a band."""
    band = Band(1, 2, 2)
    generator = torch.Generator().manual_seed(threads)
    parts = [torch.randn(1100, 1100, generator=generator) * 10.0**i for i in range(4)]
    added = (parts[0] + parts[1]) + (parts[2] + parts[3])
    bands = {"whole": WHOLE, "band": band}
    sums = {}
    for name, of in bands.items():
        a, b, c, d = (UpperTriangle(packed(part, of), of) for part in parts)
        sums[name] = Sum(Sum(a, b), Sum(c, d))
    stored = []
    before = host_threads()
    set_host_threads(threads)
    try:
        for name, found in (("added", dict.fromkeys(bands, added)), ("sums", sums)):
            store = open_store(str(tmp_path / name))
            write_symmetric(store, "h.parquet", found, bands={"band": band})
            with store.open("h.parquet") as file:
                stored.append(file.read())
    finally:
        set_host_threads(before)
    assert stored[0] == stored[1]


def test_triangles_of_different_widths_have_no_sum() -> None:
    with pytest.raises(ValueError, match="width 8 and 9: they have no sum"):
        Sum(UpperTriangle(packed(torch.zeros(8, 8))), UpperTriangle(packed(torch.zeros(9, 9))))


def test_bands_have_no_sum_with_others() -> None:
    x = torch.zeros(1100, 1100)
    with pytest.raises(ValueError, match=r"band .* they have no sum"):
        Sum(*(UpperTriangle(packed(x, band), band) for band in (Band(0, 1, 2), Band(1, 2, 2))))


def test_a_sum_of_very_many_is_read() -> None:
    """Of all experts of a block together."""
    x = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    triangle = UpperTriangle(packed(x))
    found, expected = np.empty((3, 3), dtype=np.float32), x.clone()
    total: Triangle = triangle
    for _ in range(1500):
        total, expected = Sum(total, triangle), expected + x
    total.read(slice(0, 3), slice(0, 3), found)
    assert np.array_equal(found, expected.numpy())
