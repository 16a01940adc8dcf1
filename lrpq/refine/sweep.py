"""Two streams through the blocks: the original model's, and that of the already quantized prefix.

For a site with inputs x (original) and xq (quantized prefix) and token weights s, a shard adds up

    C = sum_t s_t xq_t xq_t^T        D = sum_t s_t (x_t - xq_t) xq_t^T

which is all that correction, GPTQ and the guard need (quant/correction.py). Where a layer's output is added to the
hidden states as it is (families.Unit.added: attention's output projection, the last layer of an MLP), it can make up
for the errors that the hidden states r bring along too. There D gives way to

    P = sum_t s_t (W (x_t - xq_t) + r_t - rq_t) xq_t^T.

C is to be inverted and is summed at fp32's precision. What D and P are multiplied from is rounded to bfloat16 on a GPU,
as the streams are that it is a difference of; over the tokens that averages out.

Sites are visited in the order of the forward, so the inputs of a site already carry the errors of the quantized sites
before it in the same block.

Cost in forward passes F of the blocks: F for each stream. A site's forward stops at the site, and attention or MLP,
once the input of its last layer is known, is not run again but continued from there (families.Unit): each layer runs
once a stream. Without correction the original stream is not needed. Memory besides the streams: of each unit its
output, d_out values a token, and of the quantized stream the input of its last layer, d_in values, until that layer is
quantized and runs. The original stream moves on with the block's last site.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableSequence, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from lrpq.model.families import Unit
from lrpq.model.host_copies import HostCopies
from lrpq.model.host_memory import release_freed_memory
from lrpq.model.host_tensors import Hold, HostList, Waiting, at_hand, settled
from lrpq.model.layers import LinearSpec
from lrpq.model.streaming import BlockStream
from lrpq.quant.activation_sums import add_sum
from lrpq.quant.hessian import accumulate, empty_hessian
from lrpq.refine.products import SiteProducts, add_products, held
from lrpq.shards import Node, fold

if TYPE_CHECKING:
    from jaxtyping import Float, Int


Place = tuple[str, int, int]
"""Stream ("original" or "quantized"), shard, micro-batch."""


class _Known:
    """What is known of a unit of the block at hand, for one micro-batch of one stream."""

    def __init__(self, x: Tensor, hold: Hold) -> None:
        self._hold = hold
        self._input: Callable[[], Tensor] | None = hold(x)
        """Of its last layer, until that has run."""
        self._output: Callable[[], Tensor] | None = None

    def output(self, last: nn.Module) -> Tensor:
        """Of its last layer, which runs if it has not yet; its input is then given up."""
        if self._output is not None:
            return self._output()
        assert self._input is not None
        output: Tensor = last(self._input())
        self._output, self._input = self._hold(output), None
        return output


class QuantizedActivations(Protocol):
    """What the quantized stream's activations are rounded to, where they are quantized too (lrpq.activations)."""

    def scope(self, block: int, module: nn.Module) -> AbstractContextManager[None]:
        """Inside, the block computes with quantized activations."""
        ...

    def inputs(self, block: int, site: str, x: Tensor) -> Tensor:
        """Inputs of a site as its layers multiply them."""
        ...


class RefineSweep:
    """Streams of some shards.

    Args:
        stream: the original model.
        shards: shard index -> tokens.
        num_shards: shards of the whole run (the shape of the merge tree).
        micro_batch: windows computed at once; part of the result's identity.
        with_shift: also carry the original stream and add up D or P.
        activations: of the quantized stream: x~ are then what the layers multiply, and D or P also holds the errors of
            rounding them, this site's among them.
        low_memory: what is not at work waits in host memory: streams, what is known inside a block, sums.
    """

    def __init__(
        self,
        stream: BlockStream,
        shards: Mapping[int, Int[Tensor, "windows length"]],
        *,
        num_shards: int,
        micro_batch: int,
        with_shift: bool,
        activations: QuantizedActivations | None = None,
        low_memory: HostCopies | None = None,
    ) -> None:
        self.stream = stream
        self.activations = activations
        self.shards = shards
        self.num_shards = num_shards
        self.micro_batch = micro_batch
        self.with_shift = with_shift
        self._copies = low_memory
        self._hold: Hold = at_hand if low_memory is None else partial(Waiting.of, copies=low_memory)
        self.original: dict[int, MutableSequence[Tensor]] = {}
        """Shard -> hidden states of its micro-batches in the original model; empty without ``with_shift``."""
        self.quantized: dict[int, MutableSequence[Tensor]] = {}
        """The same behind the quantized prefix."""
        self.on_batch: Callable[[], None] = _nothing
        """Called after every micro-batch of a step."""
        self._known: dict[Place, dict[str, _Known]] = {}
        """Of the block at hand: last layer of a unit -> what is known of the unit."""
        self._moved: set[tuple[int, int]] = set()
        """(shard, micro-batch) whose original hidden states are those behind the block at hand already."""

    def embed(self) -> None:
        """Compute the first block's inputs: the same in both streams."""
        with self.stream.embedding():
            for shard, tokens in self.shards.items():
                inputs = [self.stream.embed(batch) for batch in tokens.split(self.micro_batch)]
                self.quantized[shard] = self.row(inputs)
                if self.with_shift:
                    self.original[shard] = self.row(inputs)

    def row(self, tensors: Iterable[Tensor]) -> MutableSequence[Tensor]:
        """Hidden states of a shard's micro-batches where they wait for their turn."""
        return list(tensors) if self._copies is None else HostList(tensors, self._copies)

    @torch.no_grad()
    def products(
        self,
        block: int,
        module: nn.Module,
        site: tuple[LinearSpec, ...],
        token_weights: Mapping[int, Float[Tensor, " windows*length"]] | None,
        quantized: Mapping[str, Tensor],
    ) -> dict[Node, SiteProducts]:
        """Sums of one site, complete subtrees of this worker's shards already merged.

        Args:
            block: index of the block.
            module: the block with its original weights.
            site: the layers that read the site.
            token_weights: shard -> s [windows * length], or None for ones.
            quantized: module name -> weights of the sites before this one in the block; they stay what they are, or
                ``forget`` has to be called.
        """
        reader = self.stream.local_name(site[0])
        last = site[0].input_site == list(self.stream.sites(block))[-1]
        W = module.get_submodule(reader).weight if self._adds(reader) and self.with_shift else None
        parts: dict[Node, Callable[[], SiteProducts]] = {}
        for shard, batches in self.quantized.items():
            parts = self._aside(parts)
            sums = self._empty(site[0], reader)
            offset = 0
            for position, hidden in enumerate(batches):
                with self._quantized(block, module, quantized):
                    xq, rq = self._at(reader, block, module, hidden, ("quantized", shard, position))
                if self.activations is not None:
                    xq = self.activations.inputs(block, site[0].input_site, xq)
                s = torch.ones(len(xq), dtype=torch.float32, device=xq.device)
                if token_weights is not None:
                    s = token_weights[shard][offset : offset + len(xq)].to(xq.device, torch.float32)
                offset += len(xq)
                sums = replace(sums, hessian=accumulate(sums.hessian, xq, s))
                if self.with_shift:
                    place = ("original", shard, position)
                    lacking = self._lacking(reader, block, module, place, W, xq, rq)
                    if last:
                        self._move(block, module, place)
                    total = sums.shift if sums.pull is None else sums.pull
                    assert total is not None
                    add_sum(total, lacking.mul_(s[:, None]), xq, rounded=True)
                    del lacking
                del xq, rq
                self.on_batch()
            parts[0, shard] = partial(_same, sums)
            del sums
            parts = fold(parts, self.num_shards, _merged)
        release_freed_memory()  # of the site before: its products, factors and what rounding and polishing took
        return {node: part() for node, part in parts.items()}

    def _aside(self, parts: Mapping[Node, Callable[[], SiteProducts]]) -> dict[Node, Callable[[], SiteProducts]]:
        """Sums that wait for others; in low memory those that are on the device go to the host."""
        if self._copies is None:
            return dict(parts)
        hold = partial(settled, copies=self._copies)
        return {node: held(part(), hold) if isinstance(part, partial) else part for node, part in parts.items()}

    def _lacking(
        self,
        reader: str,
        block: int,
        module: nn.Module,
        place: Place,
        W: Float[Tensor, "d_out d_in"] | None,
        xq: Float[Tensor, "tokens d_in"],
        rq: Float[Tensor, "tokens h"] | None,
    ) -> Float[Tensor, "tokens d"]:
        """x - xq, or W (x - xq) + r - rq where the layer adds to the hidden states; float32, in new memory."""
        _, shard, position = place
        if (shard, position) in self._moved:
            raise RuntimeError(f"block {block}: the sums of its last site were taken before")
        x, r = self._at(reader, block, module, self.original[shard][position], place)
        shift = x.to(torch.float32, copy=True).sub_(xq)
        if W is None:
            return shift
        assert r is not None
        assert rq is not None
        return add_sum(r.to(torch.float32, copy=True).sub_(rq), shift.T, W.T, rounded=True)

    def _empty(self, spec: LinearSpec, reader: str) -> SiteProducts:
        hessian = empty_hessian(spec.d_in, self.stream.device)
        if not self.with_shift:
            return SiteProducts(hessian=hessian, shift=None)
        if self._adds(reader):
            pull = torch.zeros(spec.d_out, spec.d_in, dtype=torch.float32, device=self.stream.device)
            return SiteProducts(hessian=hessian, shift=None, pull=pull)
        return SiteProducts(hessian=hessian, shift=torch.zeros_like(hessian.xx))

    def forget(self) -> None:
        """To be called where weights change that ``products`` has seen in the quantized stream."""
        self._known = {place: known for place, known in self._known.items() if place[0] != "quantized"}

    @torch.no_grad()
    def advance(self, block: int, module: nn.Module, quantized: Mapping[str, Tensor]) -> None:
        """Move both streams behind the block."""
        self._advance(block, module, "original", self.original)
        with self._quantized(block, module, quantized):
            self._advance(block, module, "quantized", self.quantized)
        self._known.clear()
        self._moved.clear()
        release_freed_memory()

    def run_continued(self, block: int, module: nn.Module, hidden: Tensor, place: Place) -> Float[Tensor, "n t h"]:
        """Forward of the block; a unit whose last layer's input is known from ``products`` is not run again.

        Args:
            block: index of the block.
            module: the block.
            hidden: its input.
            place: stream ("original" or "quantized"), shard and micro-batch that ``hidden`` belongs to.
        """
        with _continued(module, self.stream.family.units, self._known.get(place, {})):
            return self.stream.run(module, block, hidden)

    def _advance(self, block: int, module: nn.Module, which: str, streams: dict[int, MutableSequence[Tensor]]) -> None:
        for shard, batches in streams.items():
            for position in range(len(batches)):
                if which == "quantized" or (shard, position) not in self._moved:
                    batches[position] = self.run_continued(block, module, batches[position], (which, shard, position))
                    self._known.pop((which, shard, position), None)
                self.on_batch()

    def _move(self, block: int, module: nn.Module, place: Place) -> None:
        """Move one micro-batch of the original stream behind the block, and free what is known inside it."""
        _, shard, position = place
        batches = self.original[shard]
        batches[position] = self.run_continued(block, module, batches[position], place)
        self._known.pop(place, None)
        self._moved.add((shard, position))

    @contextmanager
    def _quantized(self, block: int, module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(self.stream.swapped(module, weights))
            if self.activations is not None:
                stack.enter_context(self.activations.scope(block, module))
            yield

    def _adds(self, reader: str) -> bool:
        return any(unit.added and unit.last == reader for unit in self.stream.family.units)

    def _at(
        self, reader: str, block: int, module: nn.Module, hidden: Tensor, place: Place
    ) -> tuple[Float[Tensor, "tokens d_in"], Float[Tensor, "tokens h"] | None]:
        """Input of a layer and, where P is wanted, the hidden states that its output is added to."""
        x = self._inputs_of(reader, block, module, hidden, place)
        if not self.with_shift or not self._adds(reader):
            return x, None
        (adding,) = (unit for unit in self.stream.family.units if unit.last == reader)
        if adding.norm is not None:
            return x, self._added_to(adding, adding.norm, block, module, hidden, place)
        r = hidden
        for unit in self.stream.family.units:
            if unit.last == reader:
                break
            if unit.last not in self._known[place]:
                self._inputs_of(unit.last, block, module, hidden, place)
            r = r + self._known[place][unit.last].output(module.get_submodule(unit.last))
        return x, r.flatten(0, -2)

    def _added_to(
        self, unit: Unit, norm: str, block: int, module: nn.Module, hidden: Tensor, place: Place
    ) -> Float[Tensor, "tokens h"]:
        """Hidden states to which the unit's output is added, in the unit's order of tokens.

        What the unit reads where its norm passes everything on; what the block pads with, zeros, is among it.
        """
        layer = module.get_submodule(norm)
        layer.forward = lambda x: x
        try:
            return self._inputs_of(unit.path, block, module, hidden, place)
        finally:
            del layer.forward

    def _inputs_of(
        self, reader: str, block: int, module: nn.Module, hidden: Tensor, place: Place
    ) -> Float[Tensor, "tokens d_in"]:
        """Input of the module ``reader`` in the block's forward, which goes no further."""
        known = self._known.setdefault(place, {})
        before = {last: found for last, found in known.items() if last != reader}
        x = self._reached(reader, block, module, hidden, before)
        if any(unit.last == reader for unit in self.stream.family.units):
            known[reader] = _Known(x, self._hold)
            if place[0] == "original":  # its weights are what they will be
                known[reader].output(module.get_submodule(reader))
        return x.flatten(0, -2)

    def _reached(self, reader: str, block: int, module: nn.Module, hidden: Tensor, known: dict[str, _Known]) -> Tensor:

        def stop(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            raise _Reached(arguments[0])

        handle = module.get_submodule(reader).register_forward_pre_hook(stop)
        try:
            with _continued(module, self.stream.family.units, known):
                self.stream.run(module, block, hidden)
        except _Reached as reached:
            reached.__traceback__ = (
                None  # its frames hold the block's activations, in a cycle until the next collection
            )
            return reached.value
        finally:
            handle.remove()
        raise RuntimeError(f"block {block}: its forward never reaches {reader}")


@contextmanager
def _continued(block: nn.Module, units: Sequence[Unit], known: Mapping[str, _Known]) -> Iterator[None]:
    """Inside, a unit whose last layer's input or output is known runs that layer at most; others run as ever."""
    replaced: list[nn.Module] = []

    def forward(unit: Unit) -> Callable[..., Any]:
        def run(*_: Any, **__: Any) -> Any:
            output = known[unit.last].output(block.get_submodule(unit.last))
            return (output, None) if unit.returns_tuple else output

        return run

    try:
        for unit in units:
            if unit.last in known:
                module = block.get_submodule(unit.path)
                module.forward = forward(unit)
                replaced.append(module)
        yield
    finally:
        for module in replaced:
            del module.forward


def _same(products: SiteProducts) -> SiteProducts:
    return products


def _merged(left: Callable[[], SiteProducts], right: Callable[[], SiteProducts]) -> Callable[[], SiteProducts]:
    return partial(_same, add_products(left(), right()))


def _nothing() -> None:
    pass


class _Reached(Exception):  # control flow, not an error
    """Carries the input of the layer at which a forward was stopped."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value
