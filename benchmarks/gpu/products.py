"""Float32 products on the units for narrower numbers: one product, or the sum of several between parts of the numbers.

A float32 number is the sum of parts of 8 bits (bfloat16) or 11 (TF32). With two parts a product of matrices is high x
high + high x low + low x high, the fourth below what is kept ("x3"); with three of bfloat16, six products ("x6"). Sums
are float32 throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from benchmarks.gpu.ceiling import float32_products

_TF32_DROPPED = 13
"""Bits of float32's mantissa that TF32 does not have."""

Parts = Sequence[Tensor]


def as_tf32(x: Tensor) -> Tensor:
    """Rounded to the nearest TF32 number, ties to even; as float32."""
    bits = x.contiguous().view(torch.int32)
    half = (1 << (_TF32_DROPPED - 1)) - 1
    rounded = (bits + (half + ((bits >> _TF32_DROPPED) & 1))) & -(1 << _TF32_DROPPED)
    return rounded.view(torch.float32)


def parts_of(x: Tensor, count: int, narrow: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """x as a sum of ``count`` numbers that ``narrow`` leaves as they are, the largest first."""
    found = []
    for _ in range(count):
        part = narrow(x)
        found.append(part)
        x = x - part.float()
    return found


def _bf16(x: Tensor) -> Tensor:
    return x.bfloat16()


def _product(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype != torch.bfloat16:
        return torch.mm(a, b)
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())  # products of bfloat16 numbers are exact in float32


class Product:
    """a^T b for matrices that are cut into parts once and used in many pieces.

    Args:
        count: parts of each number; 0 leaves float32 as it is.
        narrow: to a part.
        precision: of PyTorch's float32 products meanwhile.
    """

    def __init__(self, count: int, narrow: Callable[[Tensor], Tensor] | None, precision: str) -> None:
        self.count, self.narrow, self.precision = count, narrow, precision

    def split(self, x: Tensor) -> Parts:
        """Parts of x."""
        return [x] if self.narrow is None else parts_of(x, self.count, self.narrow)

    def add(self, total: Tensor, a: Parts, b: Parts) -> None:
        """total += a^T b, smallest products first."""
        with float32_products(self.precision):
            if self.narrow is None:
                total.addmm_(a[0].T, b[0])
                return
            pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if i + j < self.count]
            for i, j in sorted(pairs, key=sum, reverse=True):
                total.add_(_product(a[i].T, b[j]))


PRODUCTS: Mapping[str, Product] = {
    "fp32": Product(0, None, "ieee"),
    "tf32": Product(1, as_tf32, "tf32"),
    "tf32x3": Product(2, as_tf32, "tf32"),
    "bf16": Product(1, _bf16, "ieee"),
    "bf16x3": Product(2, _bf16, "ieee"),
    "bf16x6": Product(3, _bf16, "ieee"),
}
