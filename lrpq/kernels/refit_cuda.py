"""What the refit of scales does for each row around its systems, for CUDA devices, in Triton."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from lrpq.kernels.scale_search_cuda import to_stored
from lrpq.kernels.threads import on_device_of

if TYPE_CHECKING:
    from torch import Tensor

SOLVED_GROUPS = 32
"""Of a row whose equations are solved in registers, at most."""


def group_sums(codes: Tensor, X: Tensor, out: Tensor) -> None:
    """out_rg = sum of codes times X over the columns of group g; sums in float64.

    Args:
        codes: int8 [rows, columns], each row contiguous.
        X: float32, as codes.
        out: written, float64 [rows, groups], any strides.
    """
    rows, groups = out.shape
    width = X.shape[1] // groups
    block = min(1024, triton.next_power_of_2(width))
    with on_device_of(X):
        _group_sums[(rows, groups)](
            codes, X, out,
            width, codes.stride(0), X.stride(0), *out.stride(), BLOCK=block, num_warps=max(1, min(4, block // 128)),
        )  # fmt: skip


def part_empty(A: Tensor, b: Tensor) -> None:
    """Groups without codes become equations of their own: 1 on the diagonal of A, 0 in b; both are changed.

    Args:
        A: float64 [rows, groups, groups], contiguous.
        b: float64 [rows, groups], contiguous.
    """
    rows, groups = b.shape
    with on_device_of(A):
        _part_empty[(rows,)](A, b, groups, GROUPS=triton.next_power_of_2(groups), num_warps=1)


def solve(A: Tensor, b: Tensor, ds: Tensor, info: Tensor) -> None:
    """A ds = b of every row, a program each, by Gauss and Jordan without exchanges of rows, which a positive definite A
    does not need. Of few groups: A is in registers. FLOPs a row: 2 groups^3.

    Args:
        A: float64 [rows, groups, groups], contiguous, ``SOLVED_GROUPS`` groups at most.
        b: float64 [rows, groups], contiguous.
        ds: written, as b; anything where A is not positive definite.
        info: written, int32 [rows], 0 where A is positive definite.
    """
    rows, groups = b.shape
    with on_device_of(A):
        _solve[(rows,)](A, b, ds, info, groups, GROUPS=triton.next_power_of_2(groups), num_warps=1)


def judge(
    A: Tensor, b: Tensor, ds: Tensor, info: Tensor, old: Tensor, new: Tensor, rejected: Tensor, *, scale_bits: int
) -> None:
    """Scales old + ds as stored where all of a row are storable and lower its error as rounded; else the old ones.

    Args:
        A: float64 [rows, groups, groups], contiguous; of empty groups anything.
        b: float64 [rows, groups], contiguous.
        ds: steps, as b.
        info: int32 [rows], 0 where the system was solved.
        old: bfloat16 [rows, groups], contiguous.
        new: written, as old.
        rejected: written, bool [rows].
        scale_bits: of what scales are stored as, 16 or 8.
    """
    rows, groups = b.shape
    block = triton.next_power_of_2(groups)
    with on_device_of(A):
        _judge[(rows,)](
            A, b, ds, info, old, new, rejected,
            groups, GROUPS=block, SCALE_BITS=scale_bits, num_warps=max(1, min(4, block // 64)),
        )  # fmt: skip


@triton.jit
def _group_sums(codes, X, out, width, Z_row, X_row, out_row, out_group, BLOCK: tl.constexpr):
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        z = tl.load(codes + row * Z_row + group * width + column, mask=inside, other=0).to(tl.float32)
        x = tl.load(X + row * X_row + group * width + column, mask=inside, other=0.0)
        total += z.to(tl.float64) * x.to(tl.float64)
    tl.store(out + row * out_row + group * out_group, tl.sum(total, axis=0))


@triton.jit
def _part_empty(A, b, groups, GROUPS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    diagonal = A + (row * groups + group) * groups + group
    empty = tl.load(diagonal, mask=group < groups, other=1.0) <= 0
    tl.store(diagonal, tl.full([GROUPS], 1.0, tl.float64), mask=(group < groups) & empty)
    tl.store(b + row * groups + group, tl.zeros([GROUPS], tl.float64), mask=(group < groups) & empty)


@triton.jit
def _solve(A, b, ds, info, groups, GROUPS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    i, j = group[:, None], group[None, :]
    M = tl.load(A + (row * groups + i) * groups + j, mask=(i < groups) & (j < groups), other=0.0)
    x = tl.load(b + row * groups + group, mask=group < groups, other=0.0)
    failed = 0
    for k in range(groups):
        column = tl.sum(tl.where(j == k, M, 0.0), axis=1)
        pivot = tl.sum(tl.where(group == k, column, 0.0), axis=0)
        across = tl.sum(tl.where(i == k, M, 0.0), axis=0) / pivot
        found = tl.sum(tl.where(group == k, x, 0.0), axis=0) / pivot
        failed = tl.where(pivot > 0, failed, 1)  # of NaN too
        M = tl.where(i == k, across[None, :], M - column[:, None] * across[None, :])
        x = tl.where(group == k, found, x - column * found)
    tl.store(ds + row * groups + group, x, mask=group < groups)
    tl.store(info + row, failed)


@triton.jit
def _judge(A, b, ds, info, old, new, rejected, groups, GROUPS: tl.constexpr, SCALE_BITS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    inside = group < groups
    at = row * groups + group
    solved = tl.load(info + row) == 0
    before = tl.load(old + at, mask=inside, other=1.0).to(tl.float32)
    change = tl.load(ds + at, mask=inside, other=0.0)
    change = tl.where(solved & (tl.abs(change) < float("inf")), change, 0.0)  # false for NaN too
    after = to_stored((before.to(tl.float64) + change).to(tl.float32), 1.0, 1.0, SCALE_BITS)
    step = after.to(tl.float64) - before.to(tl.float64)
    pulled = tl.zeros([GROUPS], tl.float64)
    for g in range(groups):
        own = tl.sum(tl.where(group == g, step, 0.0), axis=0)
        pulled += own * tl.load(A + (row * groups + g) * groups + group, mask=inside, other=0.0)
    growth = tl.sum(pulled * step - 2 * step * tl.load(b + at, mask=inside, other=0.0), axis=0)
    storable = (tl.abs(after) < float("inf")) & (after * before > 0) & (tl.abs(after) >= 1.1754943508222875e-38)
    failed = tl.sum(tl.where(inside & (storable == 0), 1, 0), axis=0)
    better = (growth < 0) & (failed == 0)
    tl.store(new + at, tl.where(better, after, before).to(tl.bfloat16), mask=inside)
    tl.store(rejected + row, better == 0)
