"""Quadratic forms of many rows in one wide Hessian, by halves (quant/halves.py): for costs on GPUs.

In float32 the costs of a large layer's candidates take more than its rounding does. Of costs, which are compared with
each other, 16 digits are enough: over Hessians and codes of a language model's layers they differ from float64's by at
most 1.4e-4 (docs/log.md), where the product in bfloat16 alone differs by 6e-2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lrpq.quant.activation_sums import split
from lrpq.quant.grid import power_of_two
from lrpq.quant.halves import product

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

_BLOCKS = 8
"""Of columns; each pair of them is multiplied once, so (1 + 1/8) d_in^2 FLOPs a row three times over."""


class QuadraticForms:
    """dW_j H dW_j^T. Holds 1.7 times as many bfloat16 numbers as H has.

    Args:
        H: float32, symmetric.
    """

    def __init__(self, H: Float[Tensor, "d_in d_in"]) -> None:
        d_in = len(H)
        step = max(1, -(-d_in // _BLOCKS))
        self._blocks: list[tuple[slice, Tensor]] = []
        for start in range(0, d_in, step):
            columns = slice(start, min(d_in, start + step))
            high, low = split(torch.cat([H[columns, columns], 2.0 * H[columns.stop :, columns]]))
            self._blocks.append((columns, torch.cat([high, low, high])))

    def __call__(self, dW: Float[Tensor, "rows d_in"]) -> Float[Tensor, "all=rows"]:
        """Of every row, not negative, float64; products of one block of columns are summed in float32."""
        unit = power_of_two(torch.maximum(dW.amax(1), -dW.amin(1)))  # errors below 1e-19 vanish when squared
        dW = dW / unit.unsqueeze(1)
        high, low = split(dW)
        total = torch.zeros(len(dW), dtype=torch.float64, device=dW.device)
        for columns, right in self._blocks:
            rest = slice(columns.start, None)
            left = torch.cat([high[:, rest], high[:, rest], low[:, rest]], dim=1)
            total += product(left, right).mul_(dW[:, columns]).sum(1, dtype=torch.float64)
        return (total * unit.double().square()).clamp_(min=0.0)
