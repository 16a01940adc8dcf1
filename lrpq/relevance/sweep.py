"""The two streaming sweeps of the profile: forward (keep block inputs), then backward (recompute, accumulate).

Memory: one block's weights, one micro-batch's graph, one block's sums a level of the merge tree, and the kept inputs.
Cost in forward passes F over the same tokens: forward F, recompute F, one backward pass to activations about F each:
3 F for Fisher alone, 4 F with LRP, Hessians apart. With gradients on every n-th window only, (1 + 2 / n) F for Fisher:
Hessians are then summed on the way forward, and only those windows' inputs are kept (lrpq.relevance.partial).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from lrpq.errors import QuantizationError
from lrpq.model.host_copies import HostCopies
from lrpq.model.host_memory import release_freed_memory
from lrpq.model.host_tensors import Hold, HostGroups, HostTensors, settled
from lrpq.model.kept import KeptInputs
from lrpq.model.streaming import BlockStream
from lrpq.quant.activation_sums import token_squares
from lrpq.quant.hessian import HessianSum, accumulate, add, empty_hessian, merge
from lrpq.relevance.attribute import block_backward
from lrpq.relevance.composite import Relevance
from lrpq.relevance.head import head_gradient, sequence_generator
from lrpq.relevance.head_sums import HeadSums, watched_head
from lrpq.relevance.outputs import Outputs, add_outputs, empty_outputs, merge_outputs, merge_outputs_into
from lrpq.relevance.rules import Pass, PassSwitch
from lrpq.relevance.weights import squared_gradients, token_weights
from lrpq.shards import Node, fold

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSums:
    """What one block's calibration adds up to, over some shards; or the head's, which has one site and one module."""

    hessians: Mapping[str, HessianSum]
    """Input site -> relevance-weighted Hessian sums."""
    curvature: Mapping[str, Float[Tensor, " d_out"]]
    """Module name -> sum over tokens of g_tj^2 (float64), g the true gradient in nats per unit of output."""
    traces: Mapping[str, Float[Tensor, "*windows"]]
    """Module name -> sum over tokens of |g_t|^2 |x_t|^2 (float64): what costs are scaled to
    (quant/matched_curvature.py). Of every window that has gradients, in their order; one number where windows cannot be
    compared: images, which have one label each, experts, which see many tokens of one window and few of another, and
    the head, whose gradients have an end."""
    outputs: Mapping[str, Outputs]
    """Module name -> second moments of the true gradient at its outputs; not of experts, nor of the head."""
    num_tokens: int
    """Calibration tokens of the shards, as the first block has them: the same number for all blocks."""
    num_explained: int
    """Those of them that have gradients."""


def on_host(sums: BlockSums, copy: Callable[[Tensor], Tensor] = Tensor.cpu) -> BlockSums:
    """The same in host memory, where ``copy`` brings a tensor."""
    return replace(
        sums,
        hessians={
            site: replace(H, xx=copy(H.xx), x=None if H.x is None else copy(H.x)) for site, H in sums.hessians.items()
        },
        outputs={name: [copy(G) for G in chunks] for name, chunks in sums.outputs.items()},
    )


def merge_block_sums(left: BlockSums, right: BlockSums) -> BlockSums:
    """Sum of two disjoint sets of shards, in new memory; windows of ``left`` come first."""
    return BlockSums(
        hessians={site: merge(left.hessians[site], right.hessians[site]) for site in left.hessians},
        curvature={name: left.curvature[name] + right.curvature[name] for name in left.curvature},
        traces={name: _joined(left.traces[name], right.traces[name]) for name in left.traces},
        outputs={name: merge_outputs(left.outputs[name], right.outputs[name]) for name in left.outputs},
        num_tokens=left.num_tokens + right.num_tokens,
        num_explained=left.num_explained + right.num_explained,
    )


def add_block_sums(left: BlockSums, right: BlockSums) -> BlockSums:
    """The same sum, matrices in the memory of ``left``, which nobody else may hold."""
    return replace(
        left,
        hessians={site: add(left.hessians[site], right.hessians[site]) for site in left.hessians},
        curvature={name: left.curvature[name].add_(right.curvature[name]) for name in left.curvature},
        traces={name: _joined(left.traces[name], right.traces[name]) for name in left.traces},
        outputs={name: merge_outputs_into(left.outputs[name], right.outputs[name]) for name in left.outputs},
        num_tokens=left.num_tokens + right.num_tokens,
        num_explained=left.num_explained + right.num_explained,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteWeights:
    """Token weights of every site of a block, over the tokens of a shard."""

    values: Mapping[str, Float[Tensor, " tokens"]]
    """Site -> s, float32: one a token; of an expert's site, one a token that was sent there."""
    rows: Mapping[str, Int[Tensor, " tokens"]]
    """Of the sites of experts: which of the shard's tokens those are, in the order of ``values``."""
    squares: Mapping[str, Float[Tensor, " tokens"]]
    """Site -> mean squared gradient at its layers' outputs, float32, what a squared error of an output costs in nats;
    empty unless activations are to be quantized."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Some consecutive calibration windows."""

    index: int
    first_window: int
    """Index of its first window in the whole calibration set: labels are drawn by window, not by worker."""
    tokens: Int[Tensor, "windows length"]
    """Of an image classifier, images [windows, channels, height, width]: a window is what the model reads at once."""


class ProfileSweep:
    """Profile of some shards: ``embed``; ``forward`` of each block; ``seed_gradients``; ``backward``, last block first.

    Args:
        stream: the model.
        shards: the windows this worker is responsible for.
        num_shards: shards of the whole run (the shape of the merge tree).
        relevance: which token weights.
        floor: share of the mean weight that every token gets.
        power: exponent of the token weights.
        seed: seed of the label sampling.
        micro_batch: windows computed at once; part of the result's identity.
        kept: where block inputs are kept.
        with_head: also add up what quantizing the head needs, in ``head_sums``.
        for_activations: also find what quantizing activations needs: what their grids are judged by
            (``SiteWeights.squares``), and of the inputs the sums with which Hessians follow a folding of the model.
        low_memory: what is not at work waits in host memory: hidden states, gradients, sums.

    Raises:
        QuantizationError: the head is wanted, and its weight is the embedding's.
    """

    weighs_tokens: ClassVar[bool] = True
    """Whether Hessians are weighted by relevance, and summed on the way back, with the moments of outputs."""

    def __init__(
        self,
        stream: BlockStream,
        shards: Sequence[Shard],
        *,
        num_shards: int,
        relevance: Relevance,
        floor: float,
        power: float,
        seed: int,
        micro_batch: int,
        kept: KeptInputs,
        with_head: bool = False,
        for_activations: bool = False,
        low_memory: HostCopies | None = None,
    ) -> None:
        self.stream = stream
        self.head = stream.head_spec if with_head else None
        if with_head and self.head is None:
            raise QuantizationError(
                f"{stream.family.head}: its weight is the embedding's; it cannot be quantized alone"
            )
        self.shards = shards
        self.num_shards = num_shards
        self.relevance = relevance
        self.passes: tuple[Pass, ...] = relevance.passes
        self.floor = floor
        self.power = power
        self.seed = seed
        self.micro_batch = micro_batch
        self.kept = kept
        self.for_activations = for_activations
        self.head_sums: dict[Node, BlockSums] = {}
        """Of the head, by node of the merge tree; filled by ``seed_gradients``, empty without ``with_head``."""
        self.switch = PassSwitch()
        self._copies = low_memory
        self.hidden: MutableMapping[tuple[int, int], Tensor] = {} if low_memory is None else HostTensors(low_memory)
        """(shard, micro-batch) -> input of the block that comes next in the forward sweep."""
        self.losses: dict[int, tuple[float, int]] = {}
        """Shard -> summed loss of its sampled labels, nats, and their number."""
        self.on_batch: Callable[[], None] = _nothing
        """Called after every micro-batch of a block."""
        self.upstream: MutableMapping[tuple[int, int], Mapping[Pass, Tensor]] = (
            {} if low_memory is None else HostGroups(low_memory)
        )
        """(shard, micro-batch) -> gradients at the output of the block that comes next in the backward sweep."""

    def batches(self, shard: Shard) -> list[tuple[int, Int[Tensor, "n t"]]]:
        """Micro-batches of a shard: index of the first window, and tokens."""
        parts = shard.tokens.split(self.micro_batch)
        return [(shard.first_window + i * self.micro_batch, tokens) for i, tokens in enumerate(parts)]

    def explained(self, shard: Shard) -> list[tuple[int, Int[Tensor, "n t"]]]:
        """The first micro-batches of a shard, of which gradients are taken: all."""
        return self.batches(shard)

    def embed(self) -> None:
        """Compute the first block's inputs."""
        with self.stream.embedding():
            for shard in self.shards:
                for position, (_, tokens) in enumerate(self.batches(shard)):
                    self.hidden[shard.index, position] = self.stream.embed(tokens)

    @torch.no_grad()
    def forward(self, block: int, module: nn.Module) -> None:
        """Keep the inputs of one block and compute its outputs."""
        for shard in self.shards:
            self.forward_shard(block, module, shard)
        release_freed_memory()  # between kept inputs, where the next block's tensors may not fit

    def forward_shard(self, block: int, module: nn.Module, shard: Shard) -> None:
        """The same for one shard; the caller has switched gradients off."""
        num_explained = len(self.explained(shard))
        for position in range(len(self.batches(shard))):
            place = (shard.index, position)
            hidden = self.hidden[place]
            if position < num_explained and (block, *place) not in self.kept:
                self.kept.put((block, *place), hidden)
            self.hidden[place] = self.stream.run(module, block, hidden)
            self.on_batch()

    def lacks_inputs(self, block: int) -> bool:
        """Whether an input of the block is not kept: ``forward`` has to be repeated up to it."""
        return any(
            (block, shard.index, position) not in self.kept
            for shard in self.shards
            for position in range(len(self.explained(shard)))
        )

    def seed_gradients(self) -> tuple[float, int]:
        """Gradients at the last block's output; returns the sampled labels' summed loss (nats) and their number."""
        with self.stream.head() as (norm, head):
            for shard in self.shards:
                shard_nats, num_labels = 0.0, 0
                with self._watched_head() as sums:
                    for position, (first, tokens) in enumerate(self.explained(shard)):
                        gradients, nats = head_gradient(
                            norm,
                            head,
                            self.hidden.pop((shard.index, position)),
                            **self.labels(first, tokens),
                            switch=self.switch,
                            passes=self.passes,
                        )
                        self.upstream[shard.index, position] = gradients
                        shard_nats += nats
                        num_labels += self.stream.num_labels(tokens)
                        self.on_batch()
                    self.pass_over(shard, norm, sums)
                self.losses[shard.index] = (shard_nats, num_labels)
                if sums is not None:
                    self._add_head(shard, sums)
        return sum(nats for nats, _ in self.losses.values()), sum(labels for _, labels in self.losses.values())

    def pass_over(self, shard: Shard, norm: nn.Module, sums: HeadSums | None) -> None:
        """What becomes of a shard's windows of which no gradients are taken: there are none."""

    def labels(self, first: int, tokens: Int[Tensor, "n t"]) -> dict[str, Any]:
        """What ``head_gradient`` explains: labels sampled from the model, by the number of the window."""
        return {"generators": [sequence_generator(self.seed, first + i) for i in range(len(tokens))]}

    def _watched_head(self) -> AbstractContextManager[HeadSums | None]:
        if self.head is None:
            return nullcontext()
        return watched_head(self.stream.model.get_submodule(self.head.name), self.head, self.stream.device)

    def _add_head(self, shard: Shard, sums: HeadSums) -> None:
        assert self.head is not None
        found = BlockSums(
            hessians={self.head.input_site: sums.hessian},
            curvature={self.head.name: sums.curvature.cpu()},
            traces={self.head.name: sums.trace.cpu().squeeze()},
            outputs={},
            num_tokens=self.stream.num_labels(shard.tokens),
            num_explained=self.num_explained(shard),
        )
        self.head_sums = fold({**self.head_sums, (0, shard.index): found}, self.num_shards, merge_block_sums)

    def num_explained(self, shard: Shard) -> int:
        """Labels of a shard that have gradients."""
        return sum(self.stream.num_labels(tokens) for _, tokens in self.explained(shard))

    def expect(self, block: int) -> None:
        """Have the inputs of this block and of the one before it come back beside what is computed."""
        self.kept.expect(
            (index, shard.index, position)
            for index in (block, block - 1)
            for shard in self.shards
            for position in range(len(self.explained(shard)))
        )

    def backward(self, block: int, module: nn.Module) -> tuple[dict[Node, BlockSums], dict[int, SiteWeights]]:
        """Backward through one block.

        Returns:
            Sums by node of the merge tree (complete subtrees of this worker's shards already merged), and per shard the
            token weights of every site.
        """
        parts: dict[Node, Callable[[], BlockSums]] = {}
        weights: dict[int, SiteWeights] = {}
        self.expect(block)
        for shard in self.shards:
            if self._copies is not None:
                hold = partial(settled, copies=self._copies)
                parts = {
                    node: _held(part(), hold) if isinstance(part, partial) else part for node, part in parts.items()
                }
            sums, weights[shard.index] = self._shard_backward(block, module, shard)
            parts[0, shard.index] = partial(_same, sums)
            del sums
            parts = fold(parts, self.num_shards, _merged)
        release_freed_memory()
        return {node: part() for node, part in parts.items()}, weights

    def _shard_backward(self, block: int, module: nn.Module, shard: Shard) -> tuple[BlockSums, SiteWeights]:
        specs = self.stream.sites(block)
        sites = {
            site: [(spec.name, module.get_submodule(self.stream.local_name(spec))) for spec in members]
            for site, members in specs.items()
        }
        weighed = specs if self.weighs_tokens else {}
        hessians = {
            site: empty_hessian(members[0].d_in, self.stream.device, with_first=self.for_activations)
            for site, members in weighed.items()
        }
        curvature = {spec.name: torch.zeros(spec.d_out, dtype=torch.float64) for spec in self.stream.block_specs(block)}
        traces = {name: [torch.zeros(0, dtype=torch.float64)] for name in curvature}
        images = self.stream.family.pooling is not None
        whole = {spec.name for spec in self.stream.block_specs(block) if images or spec.routed}
        outputs = {
            spec.name: empty_outputs(spec.d_out, self.stream.device)
            for spec in self.stream.block_specs(block)
            if self.weighs_tokens and not spec.routed
        }

        def observe(name: str, running: Pass, x: Tensor, y: Tensor, g: Tensor) -> None:
            if running is Pass.FISHER and name in outputs:
                add_outputs(outputs[name], g)

        weights: dict[str, list[Tensor]] = {site: [] for site in weighed}
        squares: dict[str, list[Tensor]] = {site: [] for site in weighed if self.for_activations}
        rows: dict[str, list[Tensor]] = {site: [] for site, members in weighed.items() if members[0].routed}
        start = num_explained = 0
        for position in range(len(self.explained(shard))):
            hidden = self.kept.take((block, shard.index, position))
            result = block_backward(
                module,
                self.stream.call_arguments(block, (hidden.shape[0], hidden.shape[1])),
                hidden,
                self.upstream[shard.index, position],
                sites,
                switch=self.switch,
                observer=observe,
            )
            self.upstream[shard.index, position] = result.gradients
            for site, inputs in result.inputs.items() if self.weighs_tokens else ():
                stats = [result.modules[name] for name, _ in sites[site]]
                s = token_weights(stats, self.relevance, site=f"{block}.{site}", floor=self.floor, power=self.power)
                hessians[site] = accumulate(hessians[site], inputs, s)
                weights[site].append(s.float().cpu())
                if site in squares:
                    squares[site].append(squared_gradients(stats, site=f"{block}.{site}").float().cpu())
                if site in rows:
                    rows[site].append(start + result.rows[site].cpu())
            lengths = {site: token_squares(inputs).double() for site, inputs in result.inputs.items()}
            for site, members in sites.items():
                for name, _ in members:
                    if name in result.modules:  # an expert that no token was sent to has none
                        stats_of = result.modules[name]
                        products = stats_of.token_sums[Pass.FISHER].double() * lengths[site]
                        parts = products.view(1 if name in whole else len(hidden), -1).sum(1)
                        both = torch.cat([stats_of.channel_sums, parts]).cpu()
                        curvature[name] += both[: -len(parts)]
                        traces[name].append(both[-len(parts) :])
            start += hidden.shape[0] * hidden.shape[1]
            num_explained += self.stream.num_tokens(block, hidden)
            self.on_batch()
        sums = BlockSums(
            hessians=hessians,
            curvature=curvature,
            traces={n: torch.cat(t).sum() if n in whole else torch.cat(t) for n, t in traces.items()},
            outputs=outputs,
            num_tokens=num_explained if self.weighs_tokens else shard.tokens.numel(),
            num_explained=num_explained,
        )
        return sums, SiteWeights(
            values={site: torch.cat([torch.empty(0), *parts]) for site, parts in weights.items()},
            rows={site: torch.cat([torch.empty(0, dtype=torch.long), *parts]) for site, parts in rows.items()},
            squares={site: torch.cat([torch.empty(0), *parts]) for site, parts in squares.items()},
        )


def _joined(left: Tensor, right: Tensor) -> Tensor:
    """Of windows, one after the other; of numbers, their sum."""
    return torch.cat([left, right]) if left.ndim else left + right


def _held(sums: BlockSums, hold: Hold) -> Callable[[], BlockSums]:
    """Sums that are not needed at the moment."""
    xx = {site: hold(H.xx) for site, H in sums.hessians.items()}
    outputs = {name: [hold(G) for G in chunks] for name, chunks in sums.outputs.items()}
    empty = torch.empty(0)
    rest = replace(sums, hessians={site: replace(H, xx=empty) for site, H in sums.hessians.items()}, outputs={})
    return lambda: replace(
        rest,
        hessians={site: replace(H, xx=xx[site]()) for site, H in rest.hessians.items()},
        outputs={name: [G() for G in chunks] for name, chunks in outputs.items()},
    )


def _same(sums: BlockSums) -> BlockSums:
    return sums


def _merged(left: Callable[[], BlockSums], right: Callable[[], BlockSums]) -> Callable[[], BlockSums]:
    return partial(_same, add_block_sums(left(), right()))


def _nothing() -> None:
    pass
