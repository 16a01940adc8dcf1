"""Folds against their matrix form, and in parts against the whole."""

from __future__ import annotations

import pytest
import torch

from lrpq.errors import CheckpointError
from lrpq.transform import folds
from lrpq.transform.folds import (
    Fold,
    PowerOfTwo,
    RotateColumns,
    RotateLastRows,
    ScaleColumns,
    ScaleGain,
    ScaleLastRows,
    UnitGain,
    folded,
)
from lrpq.transform.orthogonal import (
    Hadamard,
    RotationKind,
    draw_rotation,
    random_orthogonal,
    rotate_axis,
)

GENERATOR = torch.Generator().manual_seed(0)
W = torch.randn(10, 12, dtype=torch.float64, generator=GENERATOR)
BIAS = torch.randn(10, dtype=torch.float64, generator=GENERATOR)
FACTOR = torch.rand(12, dtype=torch.float64, generator=GENERATOR) + 0.5
Q = random_orthogonal(3, GENERATOR)


def block_diagonal(size: int) -> torch.Tensor:
    """Identity, then as many Q as fit into the last rows."""
    num = size // 3
    return torch.block_diag(torch.eye(size - 3 * num, dtype=torch.float64), *[Q] * num)


@pytest.mark.parametrize(
    ("fold", "left", "right"),
    [
        (ScaleColumns(factor=FACTOR), None, torch.diag(FACTOR)),
        (PowerOfTwo(exponent=-3), torch.eye(10, dtype=torch.float64) / 8, None),
        (RotateColumns(Q=Q), None, block_diagonal(12)),
        (RotateLastRows(Q=Q, num_rows=9), block_diagonal(10).T, None),
        (ScaleLastRows(factor=FACTOR[:10]), torch.diag(FACTOR[:10]), None),
        (ScaleLastRows(factor=FACTOR[:4]), torch.diag(torch.cat([torch.ones(6).double(), FACTOR[:4]])), None),
    ],
)
def test_against_the_matrix_product(fold: Fold, left: torch.Tensor | None, right: torch.Tensor | None) -> None:
    before = W.clone()
    expected = W if left is None else left @ W
    expected = expected if right is None else expected @ right
    assert torch.allclose(fold(W), expected, rtol=0, atol=1e-14)
    assert torch.equal(W, before)
    if left is not None:
        assert torch.allclose(fold(BIAS), left @ BIAS, rtol=0, atol=1e-14)


def test_gains_are_scaled_behind_their_offset() -> None:
    stored = FACTOR - 1
    assert torch.allclose(ScaleGain(factor=FACTOR, offset=1.0)(stored) + 1, FACTOR**2)
    assert torch.equal(UnitGain(offset=0.0)(FACTOR), torch.ones_like(FACTOR))
    assert torch.equal(UnitGain(offset=1.0)(FACTOR), torch.zeros_like(FACTOR))


@pytest.mark.parametrize("chunk", [1, 12, 36, 10_000])
def test_parts_of_rows_make_the_whole(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folds, "CHUNK_ELEMENTS", chunk)
    columns = [ScaleColumns(factor=FACTOR), RotateColumns(Q=Q)]
    whole = RotateColumns(Q=Q)(ScaleColumns(factor=FACTOR)(W))
    assert torch.allclose(folded(W, columns, dtype=torch.float64, name="w"), whole, rtol=0, atol=1e-14)
    rows = [*columns, RotateLastRows(Q=Q, num_rows=9)]  # needs all rows at once
    expected = block_diagonal(10).T @ whole
    assert torch.allclose(folded(W, rows, dtype=torch.float64, name="w"), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("chunk", [1, 10, 35, 10_000])
def test_parts_of_columns_make_the_whole(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a layer writes is turned by rows; the columns that its inputs' rotation mixes stay together."""
    monkeypatch.setattr(folds, "CHUNK_ELEMENTS", chunk)
    changes = [RotateLastRows(Q=Q, num_rows=9), RotateColumns(Q=Q), ScaleLastRows(factor=FACTOR[:4])]
    whole = changes[2](changes[1](changes[0](W)))
    assert torch.allclose(folded(W, changes, dtype=torch.float64, name="w"), whole, rtol=0, atol=1e-14)
    parts = list(folds._parts(W, changes))
    assert all(columns.start % 3 == 0 for _, columns in parts)
    assert len(parts) == (4 if chunk < 60 else 1)


@pytest.mark.parametrize("size", [1, 2, 3, 96, 128, 256, 1280])
def test_factors_turn_as_their_matrix_does(size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    factors = draw_rotation(RotationKind.HADAMARD, size, generator=generator)
    assert isinstance(factors, Hadamard)
    matrix = factors.dense()
    X = torch.randn(3, size, 5, dtype=torch.float64, generator=generator)
    expected = torch.einsum("ij,bia->bja", matrix, X)
    assert torch.allclose(rotate_axis(X, factors), expected, rtol=0, atol=1e-13)
    assert torch.allclose(rotate_axis(X, matrix), expected, rtol=0, atol=1e-13)
    assert torch.allclose(rotate_axis(X[..., :1], factors), expected[..., :1], rtol=0, atol=1e-13)
    rows = RotateLastRows(Q=factors, num_rows=size)
    assert torch.allclose(rows(X[0]), matrix.T @ X[0], rtol=0, atol=1e-13)
    columns = RotateColumns(Q=factors)
    assert torch.allclose(columns(X[0].T), X[0].T @ matrix, rtol=0, atol=1e-13)


def test_values_are_rounded_once_from_float64() -> None:
    """Two folds that cancel give back every bit of a bfloat16 tensor; rounding between them would not."""
    stored = W.bfloat16()
    there_and_back = [ScaleColumns(factor=FACTOR), ScaleColumns(factor=1 / FACTOR)]
    assert torch.equal(folded(stored, there_and_back, dtype=torch.bfloat16, name="w"), stored)


@pytest.mark.parametrize("changes", [[], [ScaleColumns(factor=torch.ones(12).double())]])
def test_a_value_beyond_the_type_is_refused(changes: list[Fold]) -> None:
    with pytest.raises(CheckpointError, match=r"tensor big: .*float16; write float32"):
        folded(W * 1e6, changes, dtype=torch.float16, name="big")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_powers_of_two_change_no_digit(dtype: torch.dtype) -> None:
    stored = W.to(torch.bfloat16)
    made = folded(stored, (PowerOfTwo(exponent=9), PowerOfTwo(exponent=-14)), dtype=dtype, name="w")
    assert made.dtype is dtype
    assert torch.equal(made.double() * 32, stored.double())
    mixed = folded(stored, (PowerOfTwo(exponent=9), ScaleColumns(factor=FACTOR)), dtype=dtype, name="w")
    assert torch.equal(mixed, folded(stored, (ScaleColumns(factor=512 * FACTOR),), dtype=dtype, name="w"))
    with pytest.raises(CheckpointError, match="tensor w: folded values leave the range"):
        folded(stored, (PowerOfTwo(exponent=128),), dtype=dtype, name="w")
