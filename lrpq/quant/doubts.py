"""Questions to a device that can wait: each answer of its own would leave a GPU without work until it is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lrpq.quant.grid import fetch

if TYPE_CHECKING:
    from torch import Tensor

Judge = Callable[[list[float]], None]
"""Raises for numbers that must not be."""


class Doubts:
    """Numbers of tensors and what must be true of them, asked now and answered together.

    What is computed meanwhile may come from values that are refused in the end: it is to be given up then.
    """

    def __init__(self) -> None:
        self._numbers: list[Tensor] = []
        self._judges: list[tuple[int, Judge]] = []

    def ask(self, numbers: Sequence[Tensor], judge: Judge) -> None:
        """Have numbers, a tensor each, judged by the next ``settle``."""
        self._numbers += numbers
        self._judges.append((len(numbers), judge))

    def settle(self) -> None:
        """Wait once for all numbers that were asked for, and raise what the first judge raises that refuses his."""
        numbers, judges = self._numbers, self._judges
        self._numbers, self._judges = [], []
        found = fetch(*numbers) if numbers else []
        for count, judge in judges:
            own, found = found[:count], found[count:]
            judge(own)
