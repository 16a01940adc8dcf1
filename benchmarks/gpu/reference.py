"""GPTQ as the paper writes it, with explicit inverses, in the dtype of H: what the project's codes are held to."""

from __future__ import annotations

import torch
from torch import Tensor

from lrpq.model.layers import Choice
from lrpq.quant.grid import code_range

BLOCK = 128


def paper_gptq(
    W: Tensor, H: Tensor, scales: Tensor, choice: Choice, *, damping: float, order: Tensor, block: int = BLOCK
) -> Tensor:
    """Dequantized Q [rows, d_in] (Frantar et al. 2023, arXiv:2210.17323, Algorithm 1), columns in ``order``.

    Args:
        W: [rows, d_in], in the dtype of H.
        H: [d_in, d_in], undamped.
        scales: [rows, groups].
        choice: bits and group size.
        damping: added to the diagonal, in units of H.
        order: column of each step.
        block: columns between two updates of all later ones.
    """
    d_in = len(H)
    low, high = code_range(choice.bits)
    width = d_in if choice.group_size == -1 else choice.group_size
    P = H[order][:, order]
    P.diagonal().copy_(torch.where(P.diagonal() == 0, 1.0, P.diagonal()) + damping)
    L = torch.linalg.cholesky(P)
    del P
    inverse = torch.cholesky_inverse(L)
    del L
    U = torch.linalg.cholesky(inverse, upper=True)
    del inverse
    T, S = W[:, order].T.contiguous(), scales.to(W.dtype)[:, order // width].T.contiguous()
    Q = torch.empty_like(T)
    for start in range(0, d_in, block):
        stop = min(start + block, d_in)
        E = T.new_empty(stop - start, T.shape[1])
        for k in range(start, stop):
            Q[k] = (T[k] / S[k]).round_().clamp_(low, high).mul_(S[k])
            E[k - start] = (T[k] - Q[k]) / U[k, k]
            if k + 1 < stop:
                T[k + 1 : stop] -= torch.mm(U[k, k + 1 : stop].unsqueeze(1), E[k - start].unsqueeze(0))
        if stop < d_in:
            T[stop:] -= torch.mm(U[start:stop, stop:].T, E)
    back = torch.argsort(order)
    return Q[back].T.contiguous()


def total_loss(W: Tensor, Q: Tensor, H: Tensor, *, rows_at_once: int = 1024) -> float:
    """tr((W - Q) H (W - Q)^T), undamped, in the dtype of H, of all rows."""
    total = 0.0
    for start in range(0, len(W), rows_at_once):
        rows = slice(start, start + rows_at_once)
        D = W[rows].to(H.dtype) - Q[rows].to(H.dtype)
        total += float((torch.mm(D, H) * D).sum())
    return total
