"""`lrpq compress --fast` in one process: gradients on every n-th window, plain Hessians, costs from some rows, and GPTQ
on the original inputs at the choices that the plan takes.

Cost in forward passes F: (1 + 2 / n) F; besides, what uniform GPTQ has too, Hessians, their factors and one column loop
a layer, and the column loops of a few rows at every choice. What is kept of a site until its codes are made is its
Hessian on the way forward, from the way back on its factor: d_in^2 numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lrpq.allocate.plan import Plan
from lrpq.allocate.problem import CostRow
from lrpq.compare.codes import Codes, on_host
from lrpq.model.kept import KeptInputs
from lrpq.model.layers import LinearSpec
from lrpq.model.streaming import BlockStream
from lrpq.quant.factor import Factor, factorize
from lrpq.quant.gptq import gptq
from lrpq.quant.hessian import normalized
from lrpq.quant.matched_curvature import bounded_sum, matched_curvature, trace_of
from lrpq.quant.packing import storage_bits
from lrpq.quant.sampled_cost import DEFAULT_ROWS, sampled_costs
from lrpq.relevance.partial import PartialSweep
from lrpq.relevance.sweep import BlockSums, Shard, merge_block_sums
from lrpq.shards import root, split

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from lrpq.compare.workbench import Workbench

GRADIENTS_EVERY = 8
"""Of how many windows one has its gradients taken."""
KEPT_BYTES = 8 << 30
"""Host memory for kept block inputs, and as much for Hessians and factors, before they spill to disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stitched:
    """A plan with its codes."""

    plan: Plan
    codes: Codes
    """By GPTQ on the original inputs, on the host."""


def fast_codes(
    bench: Workbench,
    plan: Callable[[Sequence[CostRow]], Plan],
    *,
    gradients_every: int = GRADIENTS_EVERY,
    cost_rows: int = DEFAULT_ROWS,
) -> Stitched:
    """Find what every module would cost at every choice that fits, plan, and quantize it at its choice.

    Args:
        bench: model, tokens and terms.
        plan: from costs in nats to choices.
        gradients_every: of how many windows one has its gradients taken.
        cost_rows: rows of a layer that its costs are found from.
    """
    stream, terms = bench.stream(), bench.terms
    rows: list[CostRow] = []
    factors: dict[_Place, Factor] = {}
    with KeptInputs(memory_bytes=KEPT_BYTES) as squares:
        for block, sums in _curvature(bench, stream, squares, gradients_every):
            squares.expect(_keys(stream, block, block - 1))
            for place, specs in _places(stream, block):
                H = squares.take(place)
                factor = factorize(H, damping=terms.damping, name=specs[0].name)
                rows += _costs(bench, stream, specs, factor, H, sums, cost_rows)
                squares.put(place, factor.R)
                factors[place] = replace(factor, R=H.new_empty(0, 0))
        found = plan(rows)
        codes: Codes = {}
        for block in range(stream.num_blocks):
            squares.expect(_keys(stream, block, block + 1))
            for place, specs in _places(stream, block):
                factor = replace(factors.pop(place), R=squares.take(place))
                for spec in specs:
                    choice = found.choices[spec.name]
                    if choice is not None:
                        made = gptq(stream.weight(spec), factor, [choice], grid=terms.grid, name=spec.name)
                        codes[spec.name] = on_host(made[0])
    return Stitched(plan=found, codes=codes)


_Place = tuple[int, int]
"""A block, and which of its sites."""


def _places(stream: BlockStream, block: int) -> Iterator[tuple[_Place, tuple[LinearSpec, ...]]]:
    for number, specs in enumerate(stream.sites(block).values()):
        yield (block, number), specs


def _keys(stream: BlockStream, *blocks: int) -> Iterator[_Place]:
    """Places of these blocks, as far as there are such blocks, in the order in which they are taken."""
    for block in blocks:
        if 0 <= block < stream.num_blocks:
            yield from (place for place, _ in _places(stream, block))


def _curvature(
    bench: Workbench, stream: BlockStream, squares: KeptInputs, gradients_every: int
) -> Iterator[tuple[int, BlockSums]]:
    """Sums of the blocks' squared gradients, last block first; before the first of them all Hessians are kept."""
    terms, tokens = bench.terms, bench.tokens
    spans = split(len(tokens), terms.shards)
    with KeptInputs(memory_bytes=KEPT_BYTES) as kept:
        sweep = PartialSweep(
            stream,
            [Shard(index=i, first_window=r.start, tokens=tokens[r.start : r.stop]) for i, r in enumerate(spans)],
            num_shards=terms.shards,
            seed=terms.seed,
            micro_batch=terms.micro_batch,
            kept=kept,
            gradients_every=gradients_every,
        )
        sweep.embed()
        for block, module in stream.stream(range(stream.num_blocks)):
            hessians = root(sweep.forward_summing(block, module), terms.shards, merge_block_sums).hessians
            for place, specs in _places(stream, block):
                squares.put(place, normalized(hessians[specs[0].input_site], name=specs[0].name))
        sweep.seed_gradients()
        for block, module in stream.stream(range(stream.num_blocks - 1, -1, -1)):
            parts, _ = sweep.backward(block, module)
            yield block, root(parts, terms.shards, merge_block_sums)


def _costs(
    bench: Workbench,
    stream: BlockStream,
    specs: Sequence[LinearSpec],
    factor: Factor,
    H: Float[Tensor, "d_in d_in"],
    sums: BlockSums,
    num_rows: int,
) -> list[CostRow]:
    """Rows of the layers of a site."""
    choices, of_site = bench.fitting(specs[0]), float(trace_of(H))
    costs = sampled_costs(
        (stream.weight(spec) for spec in specs),
        [
            matched_curvature(sums.curvature[spec.name], bounded_sum(sums.traces[spec.name]), of_site)
            / sums.num_explained
            for spec in specs
        ],
        factor,
        choices,
        H,
        num_rows=num_rows,
        grid=bench.terms.grid,
        name=" + ".join(spec.name for spec in specs),
    )
    return [
        CostRow(
            module=spec,
            choice=choice,
            storage_bits=storage_bits(spec.d_out, spec.d_in, choice),
            cost_nats=cost,
        )
        for spec, of_layer in zip(specs, costs, strict=True)
        for choice, cost in zip(choices, of_layer, strict=True)
    ]
