"""Sums of one site over the two streams of a refinement (sweep.py), and how those of disjoint shards become one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrpq.model.host_tensors import Hold
from lrpq.quant.hessian import HessianSum, add, merge

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteProducts:
    """Sums of one site over some shards."""

    hessian: HessianSum
    """C with its sum of weights."""
    shift: Float[Tensor, "d_in d_in"] | None
    """D (float32); None where nothing is corrected, and where there is P."""
    pull: Float[Tensor, "d_out d_in"] | None = None
    """P (float32), of a site whose one layer adds to the hidden states."""


def copied(sums: SiteProducts, copy: Callable[[Tensor], Tensor]) -> SiteProducts:
    """The same where ``copy`` brings a tensor, such as another device."""
    return SiteProducts(
        hessian=replace(sums.hessian, xx=copy(sums.hessian.xx)),
        shift=None if sums.shift is None else copy(sums.shift),
        pull=None if sums.pull is None else copy(sums.pull),
    )


def merge_products(left: SiteProducts, right: SiteProducts) -> SiteProducts:
    """Sum of two disjoint sets of shards."""
    return SiteProducts(
        hessian=merge(left.hessian, right.hessian),
        shift=_sum(left.shift, right.shift),
        pull=_sum(left.pull, right.pull),
    )


def add_products(left: SiteProducts, right: SiteProducts) -> SiteProducts:
    """The same sum in the memory of ``left``, which nobody else may hold."""
    return SiteProducts(
        hessian=add(left.hessian, right.hessian),
        shift=_added(left.shift, right.shift),
        pull=_added(left.pull, right.pull),
    )


def _sum(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    return None if left is None or right is None else left + right


def _added(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    return None if left is None or right is None else left.add_(right)


def held(products: SiteProducts, hold: Hold) -> Callable[[], SiteProducts]:
    """Sums that are not needed at the moment: what gives them back."""
    xx = hold(products.hessian.xx)
    shift = None if products.shift is None else hold(products.shift)
    pull = None if products.pull is None else hold(products.pull)
    hessian = replace(products.hessian, xx=torch.empty(0))
    return lambda: SiteProducts(
        hessian=replace(hessian, xx=xx()),
        shift=None if shift is None else shift(),
        pull=None if pull is None else pull(),
    )
