"""Plain Hessians of a block's inputs, summed while the block runs forward.

Where gradients are taken on a part of the windows, most tokens have no relevance. A weight made up for them would stand
beside measured ones in another unit, so all tokens weigh the same: H = sum_t x_t x_t^T over all tokens, as in plain
GPTQ, and gradients serve the costs c alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrpq.model.experts import RoutedLinear
from lrpq.model.layers import LinearSpec
from lrpq.quant.hessian import HessianSum, accumulate, empty_hessian


@dataclass(slots=True, kw_only=True)
class InputSums:
    """Sums over the tokens seen so far; filled in place."""

    hessians: dict[str, HessianSum]
    """Input site -> sums, all weights one."""
    rows: dict[str, list[Tensor]]
    """Site of an expert -> which tokens it saw, a micro-batch each, on the host."""
    start: int = 0
    """Index of the first token of the micro-batch at hand."""


@contextmanager
def watched_inputs(
    block: nn.Module, sites: Mapping[str, Sequence[tuple[LinearSpec, nn.Module]]], device: torch.device | str
) -> Iterator[InputSums]:
    """While inside, every forward of the block adds the inputs of its sites, micro-batch after micro-batch.

    Args:
        block: the block with its weights.
        sites: site -> layers that read it, of which the first is watched.
        device: where sums are held.
    """
    sums = InputSums(
        hessians={site: empty_hessian(members[0][0].d_in, device) for site, members in sites.items()},
        rows={site: [] for site, members in sites.items() if members[0][0].routed},
    )

    def move(_: nn.Module, arguments: tuple[Any, ...], __: Any) -> None:
        sums.start += arguments[0].shape[0] * arguments[0].shape[1]

    handles = [members[0][1].register_forward_hook(_adds(sums, site)) for site, members in sites.items()]
    handles.append(block.register_forward_hook(move))
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def _adds(sums: InputSums, site: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def hook(module: nn.Module, arguments: tuple[Any, ...], _: Any) -> None:
        x = arguments[0].detach().flatten(0, -2)
        sums.hessians[site] = accumulate(sums.hessians[site], x, torch.ones(len(x), device=x.device))
        if isinstance(module, RoutedLinear) and module.rows is not None:
            sums.rows[site].append(sums.start + module.rows.cpu())

    return hook
