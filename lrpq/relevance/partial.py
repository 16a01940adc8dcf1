"""The profile with gradients on every n-th window only: most of its use at a fraction of its cost.

The costs c are means of squared gradients over tokens, for which few windows suffice; Hessians are sums over all tokens
in d_in^2 unknowns, for which they do not. So all windows go forward, where the plain Hessians are summed
(lrpq.relevance.inputs), and every n-th one goes backward. Cost in forward passes F: (1 + 2 / n) F, Hessians apart.

Of the run's windows those whose index n divides are counted in each shard, and the shard's first so many are taken:
windows are drawn at random, and the number is the same however they are cut. Nothing but c is taken from the gradients:
tokens all weigh the same, and how outputs work together (lrpq.relevance.outputs) is not summed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from lrpq.model.host_memory import release_freed_memory
from lrpq.quant.hessian import accumulate
from lrpq.relevance.composite import Relevance
from lrpq.relevance.head_sums import HeadSums
from lrpq.relevance.inputs import watched_inputs
from lrpq.relevance.sweep import BlockSums, ProfileSweep, Shard, add_block_sums
from lrpq.shards import Node, fold

if TYPE_CHECKING:
    from jaxtyping import Int


class PartialSweep(ProfileSweep):
    """``embed``; ``forward_summing`` of each block; ``seed_gradients``; ``backward``, last block first.

    Args:
        gradients_every: of how many windows one has its gradients taken, 2 or more.
        **profile: as for ProfileSweep, but for ``relevance``, ``floor`` and ``power``: all tokens weigh the same.
    """

    weighs_tokens: ClassVar[bool] = False

    def __init__(self, *arguments: Any, gradients_every: int, **profile: Any) -> None:
        super().__init__(*arguments, **profile, relevance=Relevance.NONE, floor=0.0, power=1.0)
        self.gradients_every = gradients_every

    def batches(self, shard: Shard) -> list[tuple[int, Int[Tensor, "n t"]]]:
        """Micro-batches of a shard; those with gradients first, and apart from the others."""
        number = self._windows_explained(shard)
        parts = ((0, shard.tokens[:number]), (number, shard.tokens[number:]))
        return [
            (shard.first_window + start + i * self.micro_batch, tokens)
            for start, windows in parts
            if len(windows)
            for i, tokens in enumerate(windows.split(self.micro_batch))
        ]

    def explained(self, shard: Shard) -> list[tuple[int, Int[Tensor, "n t"]]]:
        """Those of them of which gradients are taken."""
        last = shard.first_window + self._windows_explained(shard)
        return [(first, tokens) for first, tokens in self.batches(shard) if first < last]

    @torch.no_grad()
    def forward_summing(self, block: int, module: nn.Module) -> dict[Node, BlockSums]:
        """As ``forward``; also what the block's inputs add up to, by node of the merge tree: Hessians alone."""
        sites = {
            site: (members[0].d_in, module.get_submodule(self.stream.local_name(members[0])))
            for site, members in self.stream.sites(block).items()
        }
        parts: dict[Node, BlockSums] = {}
        for shard in self.shards:
            with watched_inputs(sites, self.stream.device) as hessians:
                self.forward_shard(block, module, shard)
            parts[0, shard.index] = BlockSums(
                hessians=hessians,
                curvature={},
                traces={},
                outputs={},
                num_tokens=shard.tokens.numel(),
                num_explained=0,
            )
            parts = fold(parts, self.num_shards, add_block_sums)
        release_freed_memory()
        return parts

    def pass_over(self, shard: Shard, norm: nn.Module, sums: HeadSums | None) -> None:
        """Forget the hidden states of windows without gradients; the head's Hessian is summed over them too."""
        for position in range(len(self.explained(shard)), len(self.batches(shard))):
            hidden = self.hidden.pop((shard.index, position))
            if sums is not None:
                with torch.no_grad():
                    x = norm(hidden)
                ones = torch.ones(x.shape[:-1], dtype=torch.float32, device=x.device)
                sums.hessian = accumulate(sums.hessian, x, ones)

    def _windows_explained(self, shard: Shard) -> int:
        """Multiples of ``gradients_every`` among the indices of the shard's windows."""
        start, stop = shard.first_window, shard.first_window + len(shard.tokens)
        return -(-stop // self.gradients_every) + -start // self.gradients_every
