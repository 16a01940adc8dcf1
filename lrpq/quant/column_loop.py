"""GPTQ's loop over the columns (quant/gptq.py), halved again and again: most of it is products of matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lrpq.kernels.columns import round_columns
from lrpq.kernels.threads import in_one_launch, usable
from lrpq.quant.factor import Factor
from lrpq.quant.halves import SPLIT_WHOLE, add_interleaved, interleaved

# Columns below which a sweep step uses vector operations instead of halving again: swept 3 .. 18 on 2 cores.
LEAF_COLUMNS = 6
# Of the compiled loops: on a CPU 16 .. 48 are within 10%.
COMPILED_LEAF = {"cpu": 48, "cuda": 256}


class Sweep(NamedTuple):
    """Result of a sweep, columns in its order: all [d_in, choices, rows]."""

    codes: Tensor  # int8
    errors: Tensor  # D = W - Q


def sweep(
    W: Tensor,
    factor: Factor,
    S: Tensor,
    bounds: Tensor,
    run: int,
    *,
    Z: Tensor | None,
    memory: Tensor | None = None,
) -> Sweep:
    """The column loop over W [d_in, rows] in sweep order, for all choices (scales S [runs, choices, rows]).

    The matrix is kept transposed, so that a column of W is contiguous. Halving: round the left half,
    propagate its errors to the right half in one matmul, round the right half. Every inner level is then a
    matmul of growing size, and only the columns of a leaf go through a loop: a compiled one where there is one
    (float32, no zero points), else vector operations. On a GPU errors are propagated by halves (quant/halves.py), and
    all of a small layer is one launch.

    ``memory``, if given, is where the errors go: fresh pages cost as much as a fifth of the sweep.
    """
    d_in, num_rows = W.shape
    shape = (d_in, S.shape[1], num_rows)
    flat = W.new_empty(math.prod(shape)) if memory is None else memory[: math.prod(shape)]
    codes = torch.empty(shape, dtype=torch.int8, device=W.device)
    # the targets t_k, updated in place until column k is rounded, and from then on its errors D_k
    T = flat.view(shape)
    if is_compiled(W, Z) and in_one_launch(W, columns=d_in, rows=shape[1] * num_rows):
        from lrpq.kernels import columns_cuda

        arguments = W.contiguous(), S.contiguous(), factor.R, bounds, factor.order // run, codes
        columns_cuda.round_columns(T, *arguments, fresh=True)
        return Sweep(codes, T)
    T.copy_(W.unsqueeze(1))
    is_cut = is_compiled(W, Z) and d_in > COMPILED_LEAF[W.device.type]
    halves = _Halves(T, factor) if is_cut and by_halves(W) else None
    round_leaf, leaf = (_compiled if is_compiled(W, Z) else _vectorized)(W, T, codes, factor, S, Z, bounds, run, halves)
    columns = T.view(d_in, -1)
    for first, middle, last in halvings(0, d_in, leaf):
        if middle == last:
            round_leaf(first, last)
        elif halves is None:
            columns[middle:last].addmm_(factor.R[first:middle, middle:last].T, columns[first:middle])
        else:
            halves.propagate(first, middle, last)
    return Sweep(codes, T)


def by_halves(W: Tensor) -> bool:
    """Whether errors are propagated by halves."""
    return W.is_cuda and usable(W)


class _Halves:
    """The errors of the columns that are rounded, in halves, and what propagates them."""

    def __init__(self, T: Tensor, factor: Factor) -> None:
        d_in = len(T)
        self.errors = torch.empty(d_in, 3, *T.shape[1:], dtype=torch.bfloat16, device=T.device)
        self._flat = self.errors.view(3 * d_in, -1)
        self._columns = T.view(d_in, -1)
        self._R = factor.R
        self._whole = interleaved(factor.R) if d_in <= SPLIT_WHOLE else None

    def propagate(self, first: int, middle: int, last: int) -> None:
        """From the columns first .. middle to the columns middle .. last."""
        if self._whole is None:
            pull = interleaved(self._R[first:middle, middle:last])
        else:
            pull = self._whole[3 * first : 3 * middle, middle:last]
        add_interleaved(self._columns[middle:last], pull, self._flat[3 * first : 3 * middle])


def is_compiled(W: Tensor, Z: Tensor | None = None) -> bool:
    """Whether a leaf goes through a compiled loop."""
    return Z is None and usable(W)


_RoundLeaf = Callable[[int, int], None]


def _compiled(
    W: Tensor,
    T: Tensor,
    codes: Tensor,
    factor: Factor,
    S: Tensor,
    Z: Tensor | None,
    bounds: Tensor,
    run: int,
    halves: _Halves | None,
) -> tuple[_RoundLeaf, int]:
    """Rounds columns first .. last by `lrpq.kernels`; and how many at a time."""
    assert Z is None
    W, S, runs = W.contiguous(), S.contiguous(), factor.order // run

    def round_leaf(first: int, last: int) -> None:
        k = slice(first, last)
        errors = None if halves is None else halves.errors[k]
        round_columns(T[k], W[k], S, factor.R[k, k], bounds, runs[k], codes[k], errors)

    return round_leaf, COMPILED_LEAF[W.device.type]


def _vectorized(
    W: Tensor,
    T: Tensor,
    codes: Tensor,
    factor: Factor,
    S: Tensor,
    Z: Tensor | None,
    bounds: Tensor,
    run: int,
    halves: _Halves | None,
) -> tuple[_RoundLeaf, int]:
    """The same by vector operations, which know no halves."""
    assert halves is None
    leaf = min(LEAF_COLUMNS, len(W))
    shape = T.shape[1:]
    leaf_codes = T.new_empty(leaf, *shape)
    bottom, top = (b.unsqueeze(1).expand(shape).contiguous() for b in bounds.unbind(1))
    # everything that the inner loop indexes, taken apart once: a tensor index costs as much as a vector
    # operation
    w, t, q, s = W.unbind(0), T.unbind(0), leaf_codes.unbind(0), S.contiguous().unbind(0)
    z = None if Z is None else Z.contiguous().unbind(0)
    group = (factor.order // run).tolist()
    bands = [factor.R.diagonal(i).tolist() for i in range(1, leaf)]  # bands[i - 1][k] = R[k, k + i]

    def round_leaf(first: int, last: int) -> None:
        for k in range(first, last):
            code, scale, d = q[k - first], s[group[k]], t[k]
            torch.div(t[k], scale, out=code).round_()
            if z is not None:
                code.add_(z[group[k]])
            torch.clamp(code, bottom, top, out=code)
            torch.addcmul(w[k], code, scale, value=-1, out=d)
            if z is not None:
                d.addcmul_(z[group[k]], scale)
            for later in range(k + 1, last):
                t[later].add_(d, alpha=bands[later - k - 1][k])
        codes[first:last] = leaf_codes[: last - first]

    return round_leaf, leaf


def halvings(first: int, last: int, leaf: int) -> Iterator[tuple[int, int, int]]:
    """Steps of the sweep, in order: (first, last, last) rounds columns, (first, middle, last) propagates to the right.

    Not a function inside the sweep that calls itself: such a closure refers to itself and would keep the sweep's
    matrices alive until the next garbage collection.
    """
    if last - first <= leaf:
        yield first, last, last
        return
    middle = (first + last) // 2
    yield from halvings(first, middle, leaf)
    yield first, middle, last
    yield from halvings(middle, last, leaf)
