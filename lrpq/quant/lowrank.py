"""A low-rank correction of what rounding left: W ~ Q + A B. For study: no format that lrpq writes stores it.

LoRC of ZeroQuant-V2 (Yao et al. 2023, arXiv:2303.08302): A B is the truncated singular value decomposition of W - Q,
the singular values' roots in either factor. Deviations: the factors are bfloat16 (there 8 bits serve too); and with the
Cholesky factor L of the (damped) Hessian, L L^T = H, the decomposition is that of (W - Q) L, whose truncation minimises
the layer-wise error tr((W - Q - A B) H (W - Q - A B)^T) instead of the plain squared error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lrpq.errors import QuantizationError
from lrpq.notation import SCALE_BITS

if TYPE_CHECKING:
    from jaxtyping import BFloat16, Float
    from torch import Tensor

FACTOR_BITS = SCALE_BITS  # bfloat16


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """A correction A B of one layer."""

    A: BFloat16[Tensor, "d_out rank"]
    B: BFloat16[Tensor, "rank d_in"]

    def dense(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "d_out d_in"]:
        """A B, multiplied in ``dtype``."""
        return self.A.to(dtype) @ self.B.to(dtype)

    @property
    def storage_bits(self) -> int:
        """Bits of both factors."""
        return storage_bits(self.A.shape[0], self.B.shape[1], self.A.shape[1])


def low_rank(
    residual: Float[Tensor, "d_out d_in"],
    rank: int,
    *,
    L: Float[Tensor, "d_in d_in"] | None = None,
    name: str = "layer",
) -> LowRank:
    """Best correction of ``rank`` for the residual W - Q; plain, or under H = L L^T (``damped_cholesky(H).L``).

    Best before the factors are rounded to bfloat16. Computes in the dtype of the residual. A rank beyond what the shape
    has is refused, as its storage would count for nothing.

    Raises QuantizationError naming the layer for an impossible rank, shapes that do not fit or values not finite.
    """
    d_out, d_in = residual.shape
    if not 1 <= rank <= min(d_out, d_in):
        raise QuantizationError(f"{name}: rank {rank} of a {d_out} x {d_in} layer; choose 1 to {min(d_out, d_in)}")
    if L is not None and tuple(L.shape) != (d_in, d_in):
        raise QuantizationError(f"{name}: a factor of {tuple(L.shape)} for {d_in} inputs; pass its own input's")
    weighted = residual if L is None else residual @ L.to(residual.dtype)
    if not bool(torch.isfinite(weighted).all()):
        raise QuantizationError(f"{name}: its residual is not finite; check the weights and the Hessian")
    U, S, Vh = torch.linalg.svd(weighted, full_matrices=False)
    root = S[:rank].sqrt()
    B = root.unsqueeze(1) * Vh[:rank]
    if L is not None:
        B = torch.linalg.solve_triangular(L.to(B.dtype), B, upper=False, left=False)
    return LowRank(A=(U[:, :rank] * root).bfloat16(), B=B.bfloat16())


def storage_bits(d_out: int, d_in: int, rank: int) -> int:
    """Bits that a correction adds to a layer: both factors in bfloat16."""
    return FACTOR_BITS * rank * (d_out + d_in)
