"""One walk back through a classifier for the grids of its activations and for the weights of the folded model.

Folding changes no output of a layer, so that gradients and relevance there are those of the model before it
(lrpq.activations.folding); sums over the inputs that are shifted and scaled follow exactly. In forward passes F: 4 F
with LRP, one more for the grids, where two walks took 3 F + 1 F + 4 F. Memory: the Hessians of all sites, on the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from lrpq.activations.folding import Folding
from lrpq.compare.codes import Codes
from lrpq.compare.terms import Terms
from lrpq.compare.workbench import Workbench
from lrpq.importance.asked import Asked
from lrpq.importance.gather import BlockEvidence, ModuleSums
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.streaming import BlockStream
from lrpq.quant.hessian import HessianSum

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class SharedWalk:
    """Args:
    bench: of the model before anything is folded.
    asked: what will be asked of folded ones.
    """

    def __init__(self, bench: Workbench, asked: Asked) -> None:
        self.asked = asked.at_outputs
        walk = (_on(evidence, "cpu") for evidence in bench.evidence(self.asked, for_activations=True))
        blocks = range(bench.stream().num_blocks - 1, -1, -1)
        self.evidence = dict(zip(blocks, walk, strict=True))
        """By block."""

    @property
    def squares(self) -> dict[int, Mapping[str, Float[Tensor, "weights=tokens"]]]:
        """Block -> site -> squared gradients at the outputs of its layers: the weight of a squared output error in
        nats."""
        return {block: evidence.squares for block, evidence in self.evidence.items()}


class FoldedBench(Workbench):
    """A folded model's workbench, whose evidence was found before it was folded.

    Args:
        source: the folded model.
        tokens: calibration images.
        terms: those of the walk.
        walk: on the model before.
        foldings: (block, site) -> what was folded.
    """

    def __init__(
        self,
        source: ModelSource,
        tokens: Float[Tensor, "n channels height width"],
        terms: Terms,
        *,
        walk: SharedWalk,
        foldings: Mapping[tuple[int, str], Folding],
    ) -> None:
        super().__init__(source, tokens, terms)
        self.walk, self.foldings = walk, foldings

    def evidence(
        self,
        asked: Asked,
        *,
        at: Codes | None = None,
        for_activations: bool = False,
        stream: BlockStream | None = None,
    ) -> Iterator[BlockEvidence]:
        """As the walk found it, carried over; what it was not asked for, or cannot know, takes another one."""
        if at is not None or for_activations or not asked.within(self.walk.asked):
            yield from super().evidence(asked, at=at, for_activations=for_activations, stream=stream)
            return
        stream = self.stream() if stream is None else stream
        for block in range(stream.num_blocks - 1, -1, -1):
            found = self.walk.evidence[block]
            for site, members in stream.sites(block).items():
                folding = self.foldings.get((block, site))
                if folding is not None:
                    found = carried(found, site, [spec.name for spec in members], folding)
            yield _on(found, self.terms.device)


def carried(evidence: BlockEvidence, site: str, modules: list[str], folding: Folding) -> BlockEvidence:
    """Evidence of the model with one more site folded, which ``modules`` read."""
    hessians = {
        name: {**sums, site: folding.of_hessian(sums[site])} if site in sums else sums
        for name, sums in evidence.hessians.items()
    }
    changed = {name: _traced(evidence.modules[name], folding) for name in modules}
    return replace(evidence, hessians=hessians, modules={**evidence.modules, **changed})


def _traced(sums: ModuleSums, folding: Folding) -> ModuleSums:
    assert sums.inputs is not None
    return replace(sums, trace=sums.inputs.squares(*folding.affine))


def _on(evidence: BlockEvidence, device: torch.device | str) -> BlockEvidence:
    """With Hessians and outputs on a device; all else is small."""

    def moved(sums: HessianSum) -> HessianSum:
        return replace(sums, xx=sums.xx.to(device), x=None if sums.x is None else sums.x.to(device))

    return replace(
        evidence,
        hessians={name: {s: moved(H) for s, H in sums.items()} for name, sums in evidence.hessians.items()},
        outputs={name: [G.to(device) for G in chunks] for name, chunks in evidence.outputs.items()},
    )
