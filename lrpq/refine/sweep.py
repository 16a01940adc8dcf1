"""Two streams through the blocks: the original model's, and that of the already quantized prefix.

For a site with inputs x (original) and xq (quantized prefix) and token weights s, a shard adds up

    C = sum_t s_t xq_t xq_t^T        D = sum_t s_t (x_t - xq_t) xq_t^T

which is all that correction, GPTQ and the guard need (quant/correction.py). Where a layer's output is added to the
hidden states as it is (families.Unit.added: attention's output projection, the last layer of an MLP), it can make up
for the errors that the hidden states r bring along too. There D gives way to

    P = sum_t s_t (W (x_t - xq_t) + r_t - rq_t) xq_t^T.

Sites are visited in the order of the forward, so the inputs of a site already carry the errors of the quantized sites
before it in the same block.

Cost in forward passes F of the blocks: F for each stream. A site's forward stops at the site, and attention or MLP,
once the input of its last layer is known, is not run again but continued from there (families.Unit). Without correction
the original stream is not needed. Memory besides the streams: those inputs, d_in values a token for each unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from lrpq.model.families import Unit
from lrpq.model.host_memory import release_freed_memory
from lrpq.model.layers import LinearSpec
from lrpq.model.streaming import BlockStream
from lrpq.quant.activation_sums import add_sum
from lrpq.quant.hessian import HessianSum, accumulate, empty_hessian, merge
from lrpq.shards import Node, fold

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteProducts:
    """Sums of one site over some shards."""

    hessian: HessianSum
    """C with its sum of weights."""
    shift: Float[Tensor, "d_in d_in"] | None
    """D (float32); None where nothing is corrected, and where there is P."""
    pull: Float[Tensor, "d_out d_in"] | None = None
    """P (float32), of a site whose one layer adds to the hidden states."""


def on_device(sums: SiteProducts, device: torch.device | str) -> SiteProducts:
    """The same on a device."""
    return SiteProducts(
        hessian=replace(sums.hessian, xx=sums.hessian.xx.to(device)),
        shift=None if sums.shift is None else sums.shift.to(device),
        pull=None if sums.pull is None else sums.pull.to(device),
    )


def merge_products(left: SiteProducts, right: SiteProducts) -> SiteProducts:
    """Sum of two disjoint sets of shards."""
    return SiteProducts(
        hessian=merge(left.hessian, right.hessian),
        shift=_sum(left.shift, right.shift),
        pull=_sum(left.pull, right.pull),
    )


def _sum(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    return None if left is None or right is None else left + right


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
    ) -> None:
        self.stream = stream
        self.activations = activations
        self.shards = shards
        self.num_shards = num_shards
        self.micro_batch = micro_batch
        self.with_shift = with_shift
        self.original: dict[int, list[Tensor]] = {}
        """Shard -> hidden states of its micro-batches in the original model; empty without ``with_shift``."""
        self.quantized: dict[int, list[Tensor]] = {}
        """The same behind the quantized prefix."""
        self.on_batch: Callable[[], None] = _nothing
        """Called after every micro-batch of a step."""
        self._known: dict[tuple[str, int, int], dict[str, Tensor]] = {}
        """(stream, shard, micro-batch) -> last layer of a unit of the block at hand -> its input."""

    def embed(self) -> None:
        """Compute the first block's inputs: the same in both streams."""
        with self.stream.embedding():
            for shard, tokens in self.shards.items():
                inputs = [self.stream.embed(batch) for batch in tokens.split(self.micro_batch)]
                self.quantized[shard] = inputs
                if self.with_shift:
                    self.original[shard] = list(inputs)

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
            quantized: module name -> weights of the sites before this one in the block.
        """
        reader = self.stream.local_name(site[0])
        W = module.get_submodule(reader).weight if self._adds(reader) and self.with_shift else None
        parts: dict[Node, SiteProducts] = {}
        for shard, batches in self.quantized.items():
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
                    original = self.original[shard][position]
                    x, r = self._at(reader, block, module, original, ("original", shard, position))
                    lacking = x.float() - xq.float()
                    if sums.pull is not None:
                        assert r is not None
                        assert rq is not None
                        assert W is not None
                        lacking = add_sum(r.float() - rq.float(), lacking.T, W.T)
                    total = sums.shift if sums.pull is None else sums.pull
                    assert total is not None
                    add_sum(total, lacking * s[:, None], xq)
                self.on_batch()
            parts[0, shard] = sums
            parts = fold(parts, self.num_shards, merge_products)
        release_freed_memory()  # of the site before: its products, factors and what rounding and polishing took
        return parts

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
        release_freed_memory()

    def run_continued(
        self, block: int, module: nn.Module, hidden: Tensor, place: tuple[str, int, int]
    ) -> Float[Tensor, "n t h"]:
        """Forward of the block; a unit whose last layer's input is known from ``products`` is not run again.

        Args:
            block: index of the block.
            module: the block.
            hidden: its input.
            place: stream ("original" or "quantized"), shard and micro-batch that ``hidden`` belongs to.
        """
        with _continued(module, self.stream.family.units, self._known.get(place, {})):
            return self.stream.run(module, block, hidden)

    def _advance(self, block: int, module: nn.Module, which: str, streams: dict[int, list[Tensor]]) -> None:
        for shard, batches in streams.items():
            for position, hidden in enumerate(batches):
                batches[position] = self.run_continued(block, module, hidden, (which, shard, position))
                self.on_batch()

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
        self, reader: str, block: int, module: nn.Module, hidden: Tensor, place: tuple[str, int, int]
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
            r = r + module.get_submodule(unit.last)(self._known[place][unit.last])
        return x, r.flatten(0, -2)

    def _added_to(
        self, unit: Unit, norm: str, block: int, module: nn.Module, hidden: Tensor, place: tuple[str, int, int]
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
        self, reader: str, block: int, module: nn.Module, hidden: Tensor, place: tuple[str, int, int]
    ) -> Float[Tensor, "tokens d_in"]:
        """Input of the module ``reader`` in the block's forward, which goes no further."""

        def stop(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            raise _Reached(arguments[0])

        known = self._known.setdefault(place, {})
        handle = module.get_submodule(reader).register_forward_pre_hook(stop)
        try:
            with _continued(module, self.stream.family.units, known):
                self.stream.run(module, block, hidden)
        except _Reached as reached:
            reached.__traceback__ = (
                None  # its frames hold the block's activations, in a cycle until the next collection
            )
            if any(unit.last == reader for unit in self.stream.family.units):
                known[reader] = reached.value
            return reached.value.flatten(0, -2)
        finally:
            handle.remove()
        raise RuntimeError(f"block {block}: its forward never reaches {reader}")


@contextmanager
def _continued(block: nn.Module, units: Sequence[Unit], known: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, a unit whose last layer's input is known runs that layer only; the others run as they are."""
    replaced: list[nn.Module] = []

    def forward(unit: Unit) -> Callable[..., Any]:
        last = block.get_submodule(unit.last)

        def run(*_: Any, **__: Any) -> Any:
            output = last(known[unit.last])
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


def _nothing() -> None:
    pass


class _Reached(Exception):  # control flow, not an error
    """Carries the input of the layer at which a forward was stopped."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value
