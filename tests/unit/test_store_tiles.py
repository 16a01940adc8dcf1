"""Tiles of an upper triangle, by runs, against one number at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tasks.store import tiles
from tasks.store.tiles import gather, scatter
from tasks.upper_triangle import Sum, UpperTriangle, packed

TILE = 4
WIDTHS = [1, 3, 4, 5, 8, 11, 21]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of four, so that every case of edges is small; strips of two tiles, as they are."""
    monkeypatch.setattr(tiles, "TILE", TILE)
    monkeypatch.setattr(tiles, "_BELOW", np.tri(TILE, k=-1, dtype=bool))
    monkeypatch.setattr("tasks.upper_triangle.STRIP", 2 * TILE)


def matrix_of(width: int, seed: int = 0) -> torch.Tensor:
    """Symmetric, with zeros of both signs."""
    x = torch.randn(width, width, generator=torch.Generator().manual_seed(seed))
    x = x.triu() + x.triu(1).T
    x[0, -1] = x[-1, 0] = -0.0
    return x


def groups_of(width: int, size: int) -> list[list[tuple[int, int]]]:
    count = -(-width // TILE)
    positions = [(row, column) for row in range(count) for column in range(row, count)]
    return [positions[i : i + size] for i in range(0, len(positions), size)]


def expected(matrix: NDArray[np.float32], position: tuple[int, int]) -> NDArray[np.float32]:
    found = np.zeros((TILE, TILE), dtype=np.float32)
    for i in range(TILE):
        for j in range(TILE):
            row, column = position[0] * TILE + i, position[1] * TILE + j
            if row <= column < len(matrix):
                found[i, j] = matrix[row, column]
    return found


@pytest.mark.parametrize("kind", ["square", "packed", "sum"])
@pytest.mark.parametrize("size", [1, 2, 5, 100])
@pytest.mark.parametrize("width", WIDTHS)
def test_tiles_are_those_of_the_upper_triangle(width: int, size: int, kind: str) -> None:
    matrix = matrix_of(width)
    source: torch.Tensor | UpperTriangle | Sum = matrix
    if kind == "packed":
        source = UpperTriangle(packed(matrix))
    if kind == "sum":
        a, b, c = (UpperTriangle(packed(matrix_of(width, seed))) for seed in (1, 2, 3))
        source = Sum(a, Sum(b, c))
        matrix = matrix_of(width, 1) + (matrix_of(width, 2) + matrix_of(width, 3))
    for group in groups_of(width, size):
        found = np.full((len(group), TILE, TILE), np.nan, dtype=np.float32)
        gather(source, width, group, found)
        wanted = np.stack([expected(matrix.numpy(), position) for position in group])
        assert found.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("size", [1, 2, 5, 100])
@pytest.mark.parametrize("width", WIDTHS)
def test_tiles_go_back_to_their_places(width: int, size: int, lower: bool) -> None:
    matrix = matrix_of(width).numpy()
    found = np.zeros((width, width), dtype=np.float32)
    for group in groups_of(width, size):
        scatter(np.stack([expected(matrix, position) for position in group]), group, found, lower=lower)
    assert found.tobytes() == (matrix if lower else np.triu(matrix)).tobytes()
