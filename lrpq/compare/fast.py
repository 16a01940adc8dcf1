"""`lrpq compress --fast` in one process: gradients on every n-th window, plain Hessians, candidates stitched.

A block is quantized at every choice as soon as its Hessians are summed, on the way forward; what is kept of its losses
is a number a row and choice, which the curvature found on the way back turns into costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lrpq.allocate.problem import CostRow
from lrpq.compare.codes import on_host
from lrpq.model.kept import KeptInputs
from lrpq.model.layers import LinearSpec
from lrpq.quant.factor import factorize
from lrpq.quant.gptq import gptq, loss
from lrpq.quant.grid import QuantizedWeight
from lrpq.quant.hessian import normalized
from lrpq.quant.packing import storage_bits
from lrpq.relevance.partial import PartialSweep
from lrpq.relevance.sweep import Shard, merge_block_sums
from lrpq.shards import root, split

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from lrpq.compare.workbench import Workbench

GRADIENTS_EVERY = 8
"""Of how many windows one has its gradients taken."""
KEPT_BYTES = 8 << 30
"""Host memory for kept block inputs before they spill to disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stitchable:
    """Candidates of every module with their costs."""

    rows: list[CostRow]
    candidates: dict[str, list[QuantizedWeight]]
    """Module -> by GPTQ on the original inputs, on the host, in the order of its rows."""


def fast_candidates(bench: Workbench, *, gradients_every: int = GRADIENTS_EVERY) -> Stitchable:
    """Quantize every module at every choice that fits, and find what each costs; nats."""
    terms, tokens = bench.terms, bench.tokens
    stream = bench.stream()
    spans = split(len(tokens), terms.shards)
    losses: dict[str, Float[Tensor, "choices d_out"]] = {}
    candidates: dict[str, list[QuantizedWeight]] = {}
    rows: list[CostRow] = []
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
            parts = sweep.forward_summing(block, module)
            hessians = root(parts, terms.shards, merge_block_sums).hessians
            for site, specs in stream.sites(block).items():
                H = normalized(hessians[site], name=specs[0].name)
                factor = factorize(H, damping=terms.damping, name=specs[0].name)
                for spec in specs:
                    W = stream.weight(spec)
                    found = gptq(W, factor, bench.fitting(spec), grid=terms.grid, name=spec.name)
                    losses[spec.name] = torch.stack([loss(W, q.dequantize(W.dtype), H) for q in found])
                    candidates[spec.name] = [on_host(q) for q in found]
        sweep.seed_gradients()
        for block, module in stream.stream(range(stream.num_blocks - 1, -1, -1)):
            parts, _ = sweep.backward(block, module)
            sums = root(parts, terms.shards, merge_block_sums)
            for spec in stream.block_specs(block):
                c = sums.curvature[spec.name].to(stream.device) / sums.num_explained
                rows += _rows(spec, candidates[spec.name], (0.5 * losses.pop(spec.name) @ c).tolist())
    return Stitchable(rows=rows, candidates=candidates)


def _rows(spec: LinearSpec, candidates: list[QuantizedWeight], costs: list[float]) -> list[CostRow]:
    return [
        CostRow(
            module=spec,
            choice=q.choice,
            storage_bits=storage_bits(spec.d_out, spec.d_in, q.choice),
            cost_nats=cost,
        )
        for q, cost in zip(candidates, costs, strict=True)
    ]
