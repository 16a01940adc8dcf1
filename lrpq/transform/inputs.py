"""What every site of every block reads, summed over calibration windows: one block in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from lrpq.errors import CalibrationError
from lrpq.model.streaming import BlockStream
from lrpq.shards import Node, fold, split

if TYPE_CHECKING:
    from jaxtyping import Int

NUM_SHARDS = 8
"""Parts of the calibration windows whose sums are merged in a tree; fixed, for it makes the sums' last digits."""
T = TypeVar("T")


@torch.no_grad()
def site_sums(
    stream: BlockStream,
    windows: Int[Tensor, "windows length"],
    *,
    empty: Callable[[int], T],
    add: Callable[[T, Tensor], T],
    merge: Callable[[T, T], T],
) -> Iterator[tuple[int, dict[str, T]]]:
    """Yield (block, site -> sum over all tokens), block after block.

    The hidden states of all windows are held; a window is run at a time, so that nothing depends on a batch size.

    Args:
        stream: the model.
        windows: token ids.
        empty: sum over no tokens for a number of inputs.
        add: sum with the inputs [tokens, d_in] of one more window; may change its argument.
        merge: sum over the tokens of both.

    Raises:
        CalibrationError: there are no windows.
    """
    if not windows.numel():
        raise CalibrationError("no calibration tokens; give at least one window")
    with stream.embedding():
        hidden = [stream.embed(window.unsqueeze(0)) for window in windows]
    shards = split(len(windows), min(NUM_SHARDS, len(windows)))

    def merge_sites(a: dict[str, T], b: dict[str, T]) -> dict[str, T]:
        return {site: merge(a[site], b[site]) for site in a}

    for block, module in stream.stream(range(stream.num_blocks)):
        parts: dict[Node, dict[str, T]] = {}
        for index, shard in enumerate(shards):
            sums = {site: empty(layers[0].d_in) for site, layers in stream.sites(block).items()}
            with _adding(stream, block, module, sums, add):
                for window in shard:
                    hidden[window] = stream.run(module, block, hidden[window])
            parts = fold({**parts, (0, index): sums}, len(shards), merge_sites)
        (merged,) = parts.values()
        yield block, merged


@contextmanager
def _adding(
    stream: BlockStream, block: int, module: nn.Module, sums: dict[str, T], add: Callable[[T, Tensor], T]
) -> Iterator[None]:
    """Add what the first layer of every site is called with."""

    def hook(site: str) -> Callable[..., None]:
        def seen(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            sums[site] = add(sums[site], arguments[0].reshape(-1, arguments[0].shape[-1]))

        return seen

    sites: Mapping[str, Any] = stream.sites(block)
    with ExitStack() as hooks:
        for site, layers in sites.items():
            layer = module.get_submodule(stream.local_name(layers[0]))
            hooks.callback(layer.register_forward_pre_hook(hook(site)).remove)
        yield
