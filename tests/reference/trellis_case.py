"""What tests of trellis codes share: weights, Hessians, columns rounded one by one."""

from __future__ import annotations

import torch
from torch import Tensor

from lrpq.kernels.trellis import round_segments
from lrpq.model.layers import Choice
from lrpq.quant.grid import QuantizedWeight
from lrpq.quant.trellis import SEGMENT_ROWS, codebook, values

ROWS = 300
"""Two whole segments and one of 44 rows."""
CHOICE = Choice(bits=3, group_size=16, trellis=True)


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hessian(d_in: int, seed: int = 0) -> Tensor:
    """Of correlated inputs."""
    X = numbers(400, d_in, seed=seed) @ (torch.eye(d_in) + numbers(d_in, d_in, seed=seed + 1) / d_in**0.5)
    X += numbers(400, 1, seed=seed + 2)
    H: Tensor = X.T @ X / len(X)
    return H


def edges_of(rows: int) -> Tensor:
    """Also of fewer rows than a layer may have."""
    return torch.tensor([*range(0, rows, SEGMENT_ROWS), rows], dtype=torch.int32)


def rounded(
    T: Tensor, bits: int, *, S: Tensor | None = None, weights: Tensor | None = None, W: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes and errors W - Q of targets [columns, rows], each column by itself."""
    columns, rows = T.shape
    S = torch.ones(columns, rows) if S is None else S.contiguous()
    weights = torch.ones(rows) if weights is None else weights
    codes, errors = torch.empty(columns, rows, dtype=torch.int8), T.clone()
    own, R = torch.arange(columns), torch.eye(columns)
    W = T if W is None else W
    round_segments(errors, W, S, R, weights, own, codebook(bits), codes, edges_of(rows), bits=bits)
    return codes, errors


def by_segment(errors: Tensor) -> Tensor:
    return torch.stack([part.sum() for part in torch.split(errors, SEGMENT_ROWS)])


def any_codes(rows: int, columns: int, bits: int) -> Tensor:
    bound = 2 ** (bits - 1)
    g = torch.Generator().manual_seed(bits)
    return torch.randint(-bound, bound, (rows, columns), generator=g, dtype=torch.int8)


def columns_of(W: Tensor, q: QuantizedWeight, order: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights, their quantized values (both float64), scales and codes, [columns, rows] in the order of a sweep."""
    width = W.shape[1] // q.scales.shape[1]
    Q = (values(q.codes, q.choice.bits) * q.scales.float().repeat_interleave(width, 1)).double()
    return W.double().T[order], Q.T[order], q.scales.float().T[order // width], q.codes.T[order]
