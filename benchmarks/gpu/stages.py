"""The project's two streaming stages on a random model, timed block by block, reading of weights left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.gpu.measure import now
from lrpq.compare.memory import peak_memory
from lrpq.compare.terms import Terms
from lrpq.model.host_copies import HostCopies
from lrpq.model.kept import KeptInputs
from lrpq.model.layers import Choice, LinearSpec
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.streaming import BlockStream
from lrpq.quant.rtn import round_to_nearest
from lrpq.refine.products import SiteProducts, merge_products
from lrpq.refine.sweep import RefineSweep
from lrpq.relevance.composite import Relevance
from lrpq.relevance.sweep import ProfileSweep, Shard, merge_block_sums
from lrpq.shards import root, split

KEPT_BYTES = 96 << 30
"""Host memory for kept inputs: nothing spills to disk here."""
PREFIX_BITS = 4
"""What the layers before a site are rounded to; to nearest, since their codes are timed elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What is run."""

    source: ModelSource
    tokens: Tensor
    device: torch.device
    shards: int
    micro_batch: int
    low_memory: bool = False
    """What is not at work waits in host memory."""

    @property
    def slices(self) -> Mapping[int, Tensor]:
        """Shard -> its windows."""
        return {i: self.tokens[r.start : r.stop] for i, r in enumerate(split(len(self.tokens), self.shards))}

    def stream(self) -> BlockStream:
        """The model in bfloat16."""
        return BlockStream(self.source, dtype=torch.bfloat16, device=self.device, low_memory=self.low_memory)

    @contextmanager
    def copies(self) -> Iterator[HostCopies | None]:
        """What brings tensors to the host and back, in low memory."""
        if not self.low_memory:
            yield None
            return
        copies = HostCopies(self.device)
        try:
            yield copies
        finally:
            copies.close()


@dataclass(slots=True, kw_only=True)
class StageTimes:
    """Seconds of all blocks together."""

    parts: dict[str, float] = field(default_factory=dict)
    """Step -> seconds."""
    outside: dict[str, float] = field(default_factory=dict)
    """What is not the blocks': embedding, head; reading and moving weights."""
    peak_bytes: int = 0

    @property
    def seconds(self) -> float:
        """Of the blocks."""
        return sum(self.parts.values())

    def add(self, step: str, seconds: float) -> None:
        self.parts[step] = self.parts.get(step, 0.0) + seconds


def run_profile(run: Run) -> StageTimes:
    """Forward stream, then backward with Fisher and LRP, Hessians of blended weights and output moments."""
    times = StageTimes()
    stream, device = run.stream(), run.device
    terms = Terms()
    shards, first = [], 0
    for index, tokens in run.slices.items():
        shards.append(Shard(index=index, first_window=first, tokens=tokens))
        first += len(tokens)
    blocks = range(stream.num_blocks)
    with peak_memory(str(device)) as peak, KeptInputs(memory_bytes=KEPT_BYTES) as kept, run.copies() as copies:
        sweep = ProfileSweep(
            stream,
            shards,
            num_shards=run.shards,
            relevance=Relevance.BLEND,
            floor=terms.floor,
            power=terms.power,
            seed=terms.seed,
            micro_batch=run.micro_batch,
            kept=kept,
            low_memory=copies,
        )
        begun = now(device)
        sweep.embed()
        times.outside["embedding"] = now(device) - begun
        for block, module in stream.stream(blocks):
            started = now(device)
            sweep.forward(block, module)
            times.add("forward", now(device) - started)
        started = now(device)
        sweep.seed_gradients()
        times.outside["head, tiny vocabulary"] = now(device) - started
        for block, module in stream.stream(blocks[::-1]):
            started = now(device)
            nodes, _ = sweep.backward(block, module)
            root(nodes, run.shards, merge_block_sums)
            del nodes
            times.add("backward", now(device) - started)
        times.outside["weights to the device, checks"] = (
            now(device) - begun - times.seconds - sum(times.outside.values())
        )
    times.peak_bytes = peak.bytes
    return times


Quantizer = Callable[[Tensor, SiteProducts, LinearSpec], Tensor]
"""From a layer's weights and the sums of its site to the quantized weights, dequantized."""


def to_nearest(W: Tensor, products: SiteProducts, spec: LinearSpec) -> Tensor:
    """A prefix that costs nothing."""
    Q: Tensor = round_to_nearest(W, Choice(bits=PREFIX_BITS, group_size=-1)).dequantize(torch.bfloat16)
    return Q


def run_refine(run: Run, quantizer: Quantizer = to_nearest) -> StageTimes:
    """Both streams, Hessians, D and P of every site; layers are quantized in between, which is not timed."""
    times = StageTimes()
    stream, device = run.stream(), run.device
    slices = run.slices
    with peak_memory(str(device)) as peak, run.copies() as copies:
        sweep = RefineSweep(
            stream,
            slices,
            num_shards=run.shards,
            micro_batch=run.micro_batch,
            with_shift=True,
            low_memory=copies,
        )
        started = now(device)
        sweep.embed()
        times.outside["embedding"] = now(device) - started
        for block, module in stream.stream(range(stream.num_blocks)):
            before: dict[str, Tensor] = {}
            for site, specs in stream.sites(block).items():
                weights = _token_weights(slices)
                started = now(device)
                products = root(sweep.products(block, module, specs, weights, before), run.shards, merge_products)
                times.add(site, now(device) - started)
                for spec in specs:
                    before[spec.name] = quantizer(stream.weight(spec), products, spec)
                del products
            started = now(device)
            sweep.advance(block, module, before)
            times.add("advance", now(device) - started)
    times.peak_bytes = peak.bytes
    return times


def _token_weights(slices: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Of mean about one, on the host as a profile leaves them."""
    g = torch.Generator().manual_seed(0)
    return {i: 0.03 + torch.rand(tokens.numel(), generator=g) for i, tokens in slices.items()}
