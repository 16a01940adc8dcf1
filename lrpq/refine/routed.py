"""Sums of the sites of experts: every expert's over the tokens that the quantized prefix sends there.

The router runs on the quantized prefix's hidden states, so an expert's tokens are not those of the original model. A
token that only the quantized prefix sends to an expert has no original input there: it adds nothing to the shift D, and
weighs as the mean of the tokens that the original model sends there (to all experts of the block, if it sends none).

One forward of the block gives the sums of many experts; they need the memory of as many Hessians.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lrpq.errors import QuantizationError
from lrpq.model.experts import LinearExperts, RoutedLinear
from lrpq.model.layers import LinearSpec
from lrpq.model.linears import EXPERTS
from lrpq.quant.hessian import accumulate, empty_hessian
from lrpq.refine.products import SiteProducts, add_products
from lrpq.refine.sweep import RefineSweep
from lrpq.shards import Node, fold

if TYPE_CHECKING:
    from jaxtyping import Float, Int

POOLED = f"{EXPERTS}.gate_up"
"""Site name of the sum over all experts' gate and up projections of a block."""
SiteTokenWeights = Mapping[str, Mapping[int, Tensor]]
"""Site -> shard -> s [windows * length]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """What one expert's layer was run on."""

    x: Float[Tensor, "n d_in"]
    rows: Int[Tensor, "rows=n"]


def dense_weights(
    values: Float[Tensor, "rows=n"], rows: Int[Tensor, "rows=n"], num_tokens: int, *, default: float = 1.0
) -> Float[Tensor, "tokens=num_tokens"]:
    """Weights of all tokens from those of the ``rows`` sent to an expert: the others weigh as the mean of these.

    ``default``: what all weigh where there are none, in the unit of the other experts' weights.
    """
    mean = float(values.mean()) if values.numel() else default
    dense = torch.full((num_tokens,), mean, dtype=torch.float32)
    dense[rows] = values.float()
    return dense


@torch.no_grad()
def routed_products(
    sweep: RefineSweep,
    block: int,
    module: nn.Module,
    specs: Sequence[LinearSpec],
    token_weights: SiteTokenWeights | None,
    quantized: Mapping[str, Tensor],
    *,
    pooled: bool,
) -> dict[str, dict[Node, SiteProducts]]:
    """Sums of experts' sites over this worker's shards; complete subtrees are merged.

    Args:
        sweep: the streams.
        block: index of the block.
        module: the block with its original weights.
        specs: experts' layers, one a site, of one projection.
        token_weights: of every expert's site of this projection in the block, or None for ones.
        quantized: module name -> weights of the sites before these in the block.
        pooled: also the sum over all experts' gate and up projections, under the name ``POOLED``.
    """
    parts: dict[str, dict[Node, SiteProducts]] = {}
    readers = {spec.input_site: sweep.stream.local_name(spec) for spec in specs}
    for shard, batches in sweep.quantized.items():
        sums = {spec.input_site: _empty(sweep, spec) for spec in specs}
        if pooled:
            sums[POOLED] = SiteProducts(hessian=empty_hessian(specs[0].d_in, sweep.stream.device), shift=None)
        offset = 0
        for position, hidden in enumerate(batches):
            place = ("quantized", shard, position)
            with sweep.stream.swapped(module, quantized), _watching(module, readers, pooled) as (seen, everything):
                sweep.run_continued(block, module, hidden, place)
            original: Mapping[str, _Seen] = {}
            if sweep.with_shift:
                with _watching(module, readers, False) as (original, _):
                    sweep.run_continued(block, module, sweep.original[shard][position], ("original", shard, position))
            num_tokens = hidden.shape[0] * hidden.shape[1]
            here = slice(offset, offset + num_tokens)
            for site, found in seen.items():
                s = _weights(token_weights, site, shard, here, found.rows)
                sums[site] = _added(sums[site], found, original.get(site), s, num_tokens)
            if pooled:
                s = torch.zeros(num_tokens, dtype=torch.float32, device=hidden.device)
                for site, rows in everything.routed.items():
                    s[rows] += _weights(token_weights, site, shard, here, rows)
                hessian = accumulate(sums[POOLED].hessian, everything.x, s)
                sums[POOLED] = SiteProducts(hessian=hessian, shift=None)
            offset += num_tokens
        for site, found_sums in sums.items():
            parts[site] = fold({**parts.get(site, {}), (0, shard): found_sums}, sweep.num_shards, add_products)
    return parts


def _empty(sweep: RefineSweep, spec: LinearSpec) -> SiteProducts:
    hessian = empty_hessian(spec.d_in, sweep.stream.device)
    return SiteProducts(hessian=hessian, shift=torch.zeros_like(hessian.xx) if sweep.with_shift else None)


def _weights(weights: SiteTokenWeights | None, site: str, shard: int, here: slice, rows: Tensor) -> Tensor:
    if weights is None:
        return torch.ones(len(rows), dtype=torch.float32, device=rows.device)
    return weights[site][shard][here].to(rows.device, torch.float32)[rows]


def _added(sums: SiteProducts, found: _Seen, original: _Seen | None, s: Tensor, num_tokens: int) -> SiteProducts:
    if sums.shift is not None and original is not None:
        place = torch.full((num_tokens,), -1, dtype=torch.long, device=found.rows.device)
        place[original.rows] = torch.arange(len(original.rows), device=place.device)
        both = place[found.rows] >= 0
        xq = found.x[both].float()
        difference = original.x[place[found.rows[both]]].float() - xq
        sums.shift.addmm_((difference * s[both][:, None]).T, xq)
    return SiteProducts(hessian=accumulate(sums.hessian, found.x, s), shift=sums.shift)


@dataclass(slots=True)
class _Everything:
    """Input of the experts of a block, and who was sent where."""

    x: Tensor
    routed: dict[str, Tensor]
    """Site of the gate and up projection -> rows of ``x``."""


@contextmanager
def _watching(
    block: nn.Module, readers: Mapping[str, str], pooled: bool
) -> Iterator[tuple[dict[str, _Seen], _Everything]]:
    """While inside, note what every reader is run on, and with ``pooled`` what all experts are."""
    seen: dict[str, _Seen] = {}
    everything = _Everything(x=torch.empty(0), routed={})

    def note(site: str) -> Any:
        def hook(layer: nn.Module, arguments: tuple[Any, ...]) -> None:
            seen[site] = _Seen(x=arguments[0], rows=cast(Tensor, cast(RoutedLinear, layer).rows))

        return hook

    def note_all(experts: nn.Module, arguments: tuple[Any, ...], _: Tensor) -> None:
        everything.x = arguments[0]
        for name, expert in experts.named_children():
            rows = getattr(getattr(expert, "gate_up_proj", None), "rows", None)
            if rows is not None:
                everything.routed[f"{EXPERTS}.{name}.gate_up"] = rows

    handles = [block.get_submodule(path).register_forward_pre_hook(note(site)) for site, path in readers.items()]
    if pooled:
        found = [m for m in block.modules() if isinstance(m, LinearExperts)]
        if len(found) != 1:
            raise QuantizationError(f"a block with {len(found)} expert layers: expected one")
        handles.append(found[0].register_forward_hook(note_all))
    try:
        yield seen, everything
    finally:
        for handle in handles:
            handle.remove()
