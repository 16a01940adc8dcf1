"""What narrower products in the column loop's updates gain in time and add to the loss of the codes."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.gpu.measure import now
from benchmarks.gpu.products import Parts, Product
from lrpq.kernels.columns import round_columns
from lrpq.model.layers import Choice
from lrpq.quant.factor import Factor
from lrpq.quant.grid import code_range

LEAF = 64
"""Columns between two updates of all later ones in the sweep; inside, the project's own loop."""


def sweep(
    W: Tensor, factor: Factor, scales: Tensor, choice: Choice, product: Product, *, leaf: int = LEAF
) -> tuple[Tensor, float]:
    """Dequantized Q [rows, d_in] with all updates between leaves by ``product``, and the seconds these took.

    Halves as the project's sweep does: left half, its errors to the right half in one product, right half.
    """
    d_in = W.shape[1]
    width = d_in if choice.group_size == -1 else choice.group_size
    Wt = W.T[factor.order].contiguous()
    T = Wt.clone().unsqueeze(1)
    S = scales.float().T.contiguous().unsqueeze(1)
    bounds = torch.tensor([code_range(choice.bits)], dtype=torch.float32, device=W.device)
    runs = factor.order // width
    codes = torch.empty(T.shape, dtype=torch.int8, device=W.device)
    R = product.split(factor.R)
    seconds = 0.0

    def visit(first: int, last: int) -> None:
        nonlocal seconds
        if last - first <= leaf:
            k = slice(first, last)
            round_columns(T[k], Wt[k], S, factor.R[k, k], bounds, runs[k], codes[k])
            return
        middle = (first + last) // 2
        visit(first, middle)
        started = now(W.device)
        pulls: Parts = [part[first:middle, middle:last] for part in R]
        product.add(T[middle:last, 0], pulls, product.split(T[first:middle, 0]))
        seconds += now(W.device) - started
        visit(middle, last)

    visit(0, d_in)
    errors = T[:, 0]
    back = torch.argsort(factor.order)
    return (Wt - errors)[back].T.contiguous(), seconds
