"""Plain Hessians of a block's inputs, summed while the block runs forward.

Where gradients are taken on a part of the windows, most tokens have no relevance. A weight made up for them would stand
beside measured ones in another unit, so all tokens weigh the same: H = sum_t x_t x_t^T over all tokens, as in plain
GPTQ, and gradients serve the costs c alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lrpq.quant.hessian import HessianSum, accumulate, empty_hessian


@contextmanager
def watched_inputs(
    sites: Mapping[str, tuple[int, nn.Module]], device: torch.device | str
) -> Iterator[dict[str, HessianSum]]:
    """While inside, every forward of a watched layer adds its inputs, all weights one; yields the sums by site.

    Args:
        sites: site -> its width d_in, and a layer that reads it. An expert's is the tokens that are sent there.
        device: where sums are held.
    """
    sums = {site: empty_hessian(d_in, device) for site, (d_in, _) in sites.items()}
    handles = [layer.register_forward_hook(_adds(sums, site)) for site, (_, layer) in sites.items()]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def _adds(sums: dict[str, HessianSum], site: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def hook(_: nn.Module, arguments: tuple[Any, ...], __: Any) -> None:
        x = arguments[0].detach()
        sums[site] = accumulate(sums[site], x, torch.ones(x.shape[:-1], dtype=torch.float32, device=x.device))

    return hook
