"""Scales refitted under H: with the codes held, the best scales of a row solve a small linear system.

Let Z_g be the codes of a row in group g (less the zero point; of a trellis the values of its states) and zero
elsewhere. The row is Q = sum_g s_g Z_g, and its error (T - Q) H (T - Q)^T is a parabola in the scales s. From the
present ones the best step ds solves

    A ds = b,      A_gh = Z_g H Z_h^T,      b_g = Z_g H (T - Q)^T,

G equations in G unknowns for each row. The scale search before rounding (quant/grid.py) sees the diagonal of H and the
codes of round-to-nearest; here both are the real ones. Fitting scales to fixed codes under the layer's error is an old
step (e.g. the alternating forms in QuantEase, arXiv:2309.01885, and in AQLM, Egiazarian et al. 2024, arXiv:2401.06118,
for codebooks).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrpq.errors import QuantizationError
from lrpq.quant.grid import QuantizedWeight, ends, fetch, largest, refuse_unless_finite
from lrpq.quant.halves import multiplied
from lrpq.quant.residual import has_kernel, write_residual
from lrpq.quant.stored_scales import nearest

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

# Of one temporary: G^2 (the systems) or d_in (products) times rows. On a GPU a cut costs some 30 launches, whatever its
# rows, and three such temporaries of float64 take 1.5 GB.
_CPU_ELEMENTS = 2**22
_GPU_ELEMENTS = 2**26
_WIDEST_BY_KERNEL = 256  # columns of a group


@dataclass(frozen=True, slots=True, kw_only=True)
class Refitted:
    """A weight whose scales were refitted, and how it went."""

    weight: QuantizedWeight
    """The codes that came in, new scales."""
    rejected: Bool[Tensor, "rows=d_out"]
    """Rows that keep their scales: the rounded ones are no better, or not storable on the same grid."""

    @property
    def rejected_rows(self) -> int:
        """How many."""
        return int(self.rejected.sum())


def refit(
    T: Float[Tensor, "d_out d_in"],
    quantized: QuantizedWeight,
    H: Float[Tensor, "d_in d_in"],
    *,
    name: str = "layer",
) -> Refitted:
    """Scales that minimise every row's error under H, all of a row jointly, rounded to what is stored.

    A row keeps its old scales unless the new ones, *as rounded*, have the lower error, and where one of them would
    change its sign or vanish: a symmetric grid stays one. A group of zeros keeps its scale.

    3 d_in^2 FLOPs a row and d_in G elementwise, products in the dtype of H, on a GPU by its halves; the systems are
    solved, and rounded scales judged, in float64. Memory besides inputs and results: some temporaries of 2^22 elements,
    on GPUs of 2^26.

    Raises QuantizationError naming the layer for shapes that do not belong together or values that are not finite.
    """
    d_out, d_in = T.shape
    if tuple(H.shape) != (d_in, d_in) or quantized.codes.shape != T.shape:
        raise QuantizationError(
            f"{name}: a target of {d_out} x {d_in}, a Hessian of {len(H)}, codes of {tuple(quantized.codes.shape)}:"
            " they must be of one layer"
        )
    for magnitude, what in zip(largest(fetch(*ends([T, H]))), ("target", "Hessian"), strict=True):
        refuse_unless_finite(magnitude, what, name=name)
    return refit_checked(T, quantized, H)


def refit_checked(
    T: Float[Tensor, "d_out d_in"], quantized: QuantizedWeight, H: Float[Tensor, "d_in d_in"]
) -> Refitted:
    """``refit`` of what is known to belong together and to be finite; no wait for the device."""
    d_out = len(T)
    scales = quantized.scales.clone(memory_format=torch.contiguous_format)
    num_rows = rows_at_once(T.shape[1], scales.shape[1], cpu=T.device.type == "cpu")
    rejected = torch.empty(d_out, dtype=torch.bool, device=T.device)
    for start in range(0, d_out, num_rows):
        rows = slice(start, start + num_rows)
        if has_kernel(T, quantized, H):
            _refit_on_gpu(T[rows], quantized.rows(rows), H, scales[rows], rejected[rows])
            continue
        old = scales[rows].double()
        A, b = _systems(T[rows], quantized, rows, H)
        new = nearest(old + _solve(A, b), quantized.choice.scale_bits).bfloat16()
        step = new.double() - old
        growth = torch.einsum("rg,rgh,rh->r", step, A, step) - 2 * (step * b).sum(1)
        storable = torch.isfinite(new) & (new * old > 0) & (new.abs() >= torch.finfo(torch.bfloat16).tiny)
        better = (growth < 0) & storable.all(1)
        scales[rows] = torch.where(better.unsqueeze(1), new, scales[rows])
        rejected[rows] = ~better
    weight = QuantizedWeight(
        codes=quantized.codes, scales=scales, choice=quantized.choice, zero_points=quantized.zero_points
    )
    return Refitted(weight=weight, rejected=rejected)


def rows_at_once(d_in: int, groups: int, *, cpu: bool) -> int:
    """Rows whose systems are made and solved together."""
    return max(1, (_CPU_ELEMENTS if cpu else _GPU_ELEMENTS) // max(d_in, groups**2))


def _systems(T: Tensor, quantized: QuantizedWeight, rows: slice, H: Tensor) -> tuple[Tensor, Tensor]:
    """A [rows, G, G] and b [rows, G] of the text above, float64."""
    num, d_in = T.shape
    s = quantized.scales[rows].to(H.dtype).unsqueeze(2)
    num_groups = s.shape[1]
    width = d_in // num_groups
    Z = quantized.units(H.dtype, rows).view(num, num_groups, width)
    D = T.to(H.dtype) - (Z * s).view(num, d_in)
    b = torch.einsum("rgw,rgw->rg", Z, (D @ H).view(num, num_groups, width)).double()
    A = torch.empty(num, num_groups, num_groups, dtype=torch.float64, device=T.device)
    for g in range(num_groups):  # each pair of groups once: A is symmetric
        columns = slice(g * width, (g + 1) * width)
        ZH = (Z[:, g] @ H[columns, columns.start :]).view(num, num_groups - g, width)
        A[:, g, g:] = torch.einsum("rgw,rgw->rg", ZH, Z[:, g:])
        A[:, g:, g] = A[:, g, g:]
    return A, b


def _refit_on_gpu(T: Tensor, quantized: QuantizedWeight, H: Tensor, new: Tensor, rejected: Tensor) -> None:
    """The same by kernels, into new scales and which rows keep theirs. Sums over a group are float64 here, H D is by
    halves."""
    from lrpq.kernels.group_products_cuda import group_products
    from lrpq.kernels.refit_cuda import SOLVED_GROUPS, group_sums, judge, part_empty, solve

    (rows, d_in), num_groups = T.shape, new.shape[1]
    codes, old = quantized.codes.contiguous(), quantized.scales.contiguous()
    D = write_residual(T, quantized, H.new_empty(rows, d_in))
    b = H.new_empty(rows, num_groups, dtype=torch.float64)
    group_sums(codes, multiplied(D, H), b)
    A = H.new_empty(rows, num_groups, num_groups, dtype=torch.float64)
    if fills_a_gpu(d_in, num_groups):
        group_products(codes, H, A)
    else:
        width = d_in // num_groups
        for g in range(num_groups):
            own = slice(g * width, (g + 1) * width)
            group_sums(codes[:, own.start :], codes[:, own].to(H.dtype) @ H[own, own.start :], A[:, g, g:])
            A[:, g:, g] = A[:, g, g:]
    part_empty(A, b)
    if num_groups <= SOLVED_GROUPS:  # PyTorch's take half a millisecond, however small the systems
        ds, info = torch.empty_like(b), torch.empty(rows, dtype=torch.int32, device=b.device)
        solve(A, b, ds, info)
    else:
        L, info = torch.linalg.cholesky_ex(A)
        ds = torch.cholesky_solve(b.unsqueeze(2), L).squeeze(2).contiguous()
    judge(A, b, ds, info, old, new, rejected, scale_bits=quantized.choice.scale_bits)


def fills_a_gpu(d_in: int, groups: int) -> bool:
    """Whether pairs of groups are so many that one launch multiplies all; of a few wide groups products of matrices do
    it."""
    return groups > 1 and d_in // groups <= _WIDEST_BY_KERNEL


def _solve(A: Tensor, b: Tensor) -> Tensor:
    """ds of every row; zero where the system is not positive definite, and for groups without codes."""
    diagonal = A.diagonal(dim1=1, dim2=2)
    empty = diagonal <= 0
    system = A.clone()
    system.diagonal(dim1=1, dim2=2).copy_(torch.where(empty, 1.0, diagonal))
    L, info = torch.linalg.cholesky_ex(system)
    ds = torch.cholesky_solve(torch.where(empty, 0.0, b).unsqueeze(2), L).squeeze(2)
    return torch.where((info == 0).unsqueeze(1) & torch.isfinite(ds), ds, 0.0)
