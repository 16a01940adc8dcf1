"""Exact changes of one stored tensor, and the plan of all tensors that a transform changes.

A fold is a small value that maps a tensor in float64 to a tensor of the same shape. Matrices are [d_out, d_in] as on
disk; rows are outputs, columns are inputs. Biases and gains are vectors and take the folds of rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from types import EllipsisType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from lrpq.errors import CheckpointError
from lrpq.finite import all_finite
from lrpq.transform.orthogonal import Orthogonal, rotate_axis

if TYPE_CHECKING:
    from jaxtyping import Float

CHUNK_ELEMENTS = 1 << 22  # 32 MB in float64: what a large embedding is folded in


class Fold(Protocol):
    """One exact change."""

    @property
    def rowwise(self) -> bool:
        """Whether every row is changed by itself, so that a matrix can be folded in parts."""
        ...

    @property
    def column_unit(self) -> int | None:
        """Columns that change together and apart from all others; None where a part has to know its place."""
        ...

    def __call__(self, W: Tensor) -> Tensor:
        """The changed tensor, in new memory."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerOfTwo:
    """2^exponent times every value, which changes no digit."""

    exponent: int
    rowwise: bool = field(default=True, init=False)
    column_unit: int | None = field(default=1, init=False)

    def __call__(self, W: Tensor) -> Tensor:
        """Scaled values."""
        return W * 2.0**self.exponent


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleColumns:
    """W diag(factor): the layer's inputs were divided by ``factor``, or a norm's gain moves into it."""

    factor: Float[Tensor, "columns=d_in"]
    rowwise: bool = field(default=True, init=False)
    column_unit: int | None = field(default=None, init=False)

    def __call__(self, W: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_in"]:
        """Every row times ``factor``."""
        return W * self.factor


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleLastRows:
    """diag(factor) times the last rows, as many as there are factors; of a bias, its last entries."""

    factor: Float[Tensor, "rows=d_out"]
    rowwise: bool = field(default=False, init=False)
    column_unit: int | None = field(default=1, init=False)

    def __call__(self, W: Float[Tensor, "d_out columns=d_in"]) -> Float[Tensor, "d_out columns=d_in"]:
        """Scaled rows."""
        changed = W.clone()
        changed[-len(self.factor) :] *= self.factor.view(-1, *[1] * (W.ndim - 1))
        return changed


@dataclass(frozen=True, slots=True, kw_only=True)
class RotateColumns:
    """W diag(Q, .., Q): the layer reads x Q in blocks of the size of Q; also an embedding whose rows are rotated."""

    Q: Orthogonal
    rowwise: bool = field(default=True, init=False)

    @property
    def column_unit(self) -> int | None:
        """Blocks."""
        return len(self.Q)

    def __call__(self, W: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_in"]:
        """Every row times the block diagonal matrix."""
        return rotate_axis(W.reshape(-1, len(self.Q), 1), self.Q).reshape(W.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class RotateLastRows:
    """diag(Q, .., Q)^T times the last ``num_rows`` rows: the layer writes y Q. Of a bias, its last entries."""

    Q: Orthogonal
    num_rows: int
    rowwise: bool = field(default=False, init=False)
    column_unit: int | None = field(default=1, init=False)

    def __call__(self, W: Float[Tensor, "d_out columns=d_in"]) -> Float[Tensor, "d_out columns=d_in"]:
        """Rotated rows."""
        changed = W.clone()
        blocks = W[-self.num_rows :].reshape(-1, len(self.Q), W[0].numel())
        changed[-self.num_rows :] = rotate_axis(blocks, self.Q).reshape(self.num_rows, *W.shape[1:])
        return changed


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleGain:
    """A norm's gain times ``factor``; what is stored is the gain minus ``offset`` (Gemma: 1)."""

    factor: Float[Tensor, "channels=h"]
    offset: float
    rowwise: bool = field(default=False, init=False)
    column_unit: int | None = field(default=None, init=False)

    def __call__(self, W: Float[Tensor, "channels=h"]) -> Float[Tensor, "channels=h"]:
        """The stored part of the changed gain."""
        return (W + self.offset) * self.factor - self.offset


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitGain:
    """A norm without a gain: the stored part of 1."""

    offset: float
    rowwise: bool = field(default=False, init=False)
    column_unit: int | None = field(default=None, init=False)

    def __call__(self, W: Float[Tensor, "channels=h"]) -> Float[Tensor, "channels=h"]:
        """Constant."""
        return torch.full_like(W, 1.0 - self.offset)


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldedTensor:
    """A tensor of the new model."""

    name: str
    """On disk, in the new folder."""
    origin: str
    """Tensor of the source that it is made from."""
    folds: tuple[Fold, ...]
    """Applied in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedPair:
    """A feed and a site that stay as they are, though the table has them."""

    block: int
    site: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldPlan:
    """All that a transform changes; every tensor that is not named is taken over."""

    tensors: Mapping[str, FoldedTensor]
    """Name in the new folder -> what it is made of."""
    config_changes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ``config.json``."""
    skipped: tuple[SkippedPair, ...] = ()


class FoldList:
    """Collects folds by tensor name, in the order in which they are to be applied."""

    def __init__(self) -> None:
        self._folds: dict[str, list[Fold]] = {}
        self._origins: dict[str, str] = {}

    def add(self, names: Sequence[str], *folds: Fold, origin: str | None = None) -> None:
        """Add folds to every one of some tensors; ``origin`` where a tensor is made from another one."""
        for name in names:
            self._folds.setdefault(name, []).extend(folds)
            self._origins[name] = origin or self._origins.get(name, name)

    def tensors(self) -> dict[str, FoldedTensor]:
        """What was collected."""
        return {
            name: FoldedTensor(name=name, origin=self._origins[name], folds=tuple(folds))
            for name, folds in self._folds.items()
        }


def folded(W: Tensor, folds: Sequence[Fold], *, dtype: torch.dtype, name: str) -> Tensor:
    """Apply folds in float64 and round once, to ``dtype``; folds that keep all digits are applied in ``dtype``.

    A matrix whose folds are row by row, or apart for some columns, is folded in parts of ``CHUNK_ELEMENTS``.

    Raises:
        CheckpointError: a value leaves the range of ``dtype``.
    """
    made = torch.empty(W.shape, dtype=dtype, device=W.device)
    within = torch.float64 if powers_of_two(folds) is None else dtype  # as good in any type, and faster
    for part in _parts(W, folds):
        made[part] = reduce(lambda values, fold: fold(values), folds, W[part].to(within))
        _check_range(made[part], name)
    return made


def scaled_in_place(W: Tensor, folds: Sequence[PowerOfTwo], *, name: str) -> Tensor:
    """The same for powers of two alone, in the memory of ``W``, which nobody else may hold.

    Raises:
        CheckpointError: a value leaves the range of its dtype.
    """
    for part in _parts(W, folds):
        for fold in folds:
            W[part].mul_(2.0**fold.exponent)
        _check_range(W[part], name)
    return W


def powers_of_two(folds: Sequence[Fold]) -> tuple[PowerOfTwo, ...] | None:
    """The folds, if they are such alone: folded values then have no more digits than those before."""
    found = tuple(fold for fold in folds if isinstance(fold, PowerOfTwo))
    return found if len(found) == len(folds) else None


def _parts(W: Tensor, folds: Sequence[Fold]) -> Iterator[tuple[slice | EllipsisType, ...]]:
    """Parts of a tensor that can be folded one after the other."""
    units = [fold.column_unit for fold in folds]
    if W.ndim == 2 and all(fold.rowwise for fold in folds):
        step = max(1, CHUNK_ELEMENTS // max(W.shape[1], 1))
        yield from ((slice(start, start + step),) for start in range(0, len(W), step))
    elif W.ndim == 2 and None not in units:
        unit = math.lcm(*(unit for unit in units if unit is not None))
        step = unit * max(1, CHUNK_ELEMENTS // max(len(W) * unit, 1))
        yield from ((slice(None), slice(start, start + step)) for start in range(0, W.shape[1], step))
    else:
        yield (...,)


def _check_range(made: Tensor, name: str) -> None:
    if not all_finite(made):
        raise CheckpointError(f"tensor {name}: folded values leave the range of {made.dtype}; write float32 instead")
