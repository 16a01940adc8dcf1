"""Matrices that travel as upper triangles: nothing of the triangle is lost, and few bytes of the rest come along."""

from __future__ import annotations

import pytest
import torch

from tasks import upper_triangle
from tasks.upper_triangle import packed, unpacked


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


def test_what_is_no_triangle_is_refused() -> None:
    with pytest.raises(ValueError, match="no upper triangle"):
        unpacked(torch.zeros(upper_triangle._numel(600) + 1))
