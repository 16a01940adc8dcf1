"""What rounding a layer costs along the error itself, without a product of separate means.

Let g_t be the gradients at a layer's outputs of the loss of labels that are sampled from the model, summed over a
window (docs/methods.md, section 1), x_t the layer's inputs. If its weights alone change by dW, the window's predictions
change to second order by

    1/2 E[(sum_t g_t . dW x_t)^2] = 1/2 E[<G, dW>^2]  nats,  G = sum_t g_t x_t^T,

for the scores of labels of different tokens are not correlated. The curvature c tr(dW H dW^T) makes of this a product
of means: of the gradients' squares over tokens and rows, and of the inputs' squares. Here nothing is left out but what
lies beyond the second order, at the price of noise: of n windows an estimate has a relative standard error of
sqrt(2 / n). It takes one more walk back, and the products G, as many FLOPs as a forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lrpq.model.kept import KeptInputs
from lrpq.model.layers import Choice, LinearSpec
from lrpq.model.streaming import BlockStream
from lrpq.quant.grid import QuantizedWeight
from lrpq.relevance.attribute import block_backward
from lrpq.relevance.composite import Relevance
from lrpq.relevance.passes import widen
from lrpq.relevance.rules import Pass
from lrpq.relevance.sweep import ProfileSweep, Shard

if TYPE_CHECKING:
    from jaxtyping import Float, Int

Candidates = Callable[[LinearSpec], Sequence[QuantizedWeight]]
"""From a layer to ways of rounding it, of different choices."""


def directional_costs(
    stream: BlockStream,
    tokens: Int[Tensor, "windows length"],
    candidates: Candidates,
    *,
    seed: int,
    micro_batch: int,
    kept_bytes: int = 8 << 30,
) -> dict[str, dict[Choice, float]]:
    """Module -> choice -> cost, nats a token.

    Memory: that of a profile, the errors of one block's candidates in float32, and G of a micro-batch's windows.

    Args:
        stream: the model, dense.
        tokens: calibration windows.
        candidates: what layers may be rounded to.
        seed: of the sampled labels, which are those of a profile with this seed.
        micro_batch: windows computed at once.
        kept_bytes: host memory for block inputs before they spill to disk.
    """
    found: dict[str, dict[Choice, float]] = {}
    with KeptInputs(memory_bytes=kept_bytes) as kept:
        sweep = _DirectionalSweep(
            stream,
            [Shard(index=0, first_window=0, tokens=tokens)],
            num_shards=1,
            relevance=Relevance.FISHER,
            floor=0.0,
            power=1.0,
            seed=seed,
            micro_batch=micro_batch,
            kept=kept,
        )
        sweep.embed()
        for block, module in stream.stream(range(stream.num_blocks)):
            sweep.forward(block, module)
        sweep.seed_gradients()
        for block, module in stream.stream(range(stream.num_blocks - 1, -1, -1)):
            found |= sweep.respond(block, module, candidates)
    return found


class _DirectionalSweep(ProfileSweep):
    def respond(self, block: int, module: nn.Module, candidates: Candidates) -> dict[str, dict[Choice, float]]:
        """Walk one block back; what its modules cost at their choices."""
        (shard,) = self.shards
        specs = self.stream.block_specs(block)
        errors = {spec.name: _errors(self.stream.weight(spec), candidates(spec)) for spec in specs}
        sites = {
            site: [(spec.name, module.get_submodule(self.stream.local_name(spec))) for spec in members]
            for site, members in self.stream.sites(block).items()
        }
        squares: dict[str, dict[Choice, list[float]]] = {name: {c: [] for c in of} for name, of in errors.items()}
        for position, (_, tokens) in enumerate(self.batches(shard)):
            hidden = self.kept.take((block, shard.index, position))
            n = len(tokens)

            def observe(name: str, _: Pass, x: Tensor, __: Tensor, g: Tensor, n: int = n) -> None:
                for choice, responses in _responses(x, g, n, errors[name]).items():
                    squares[name][choice].append(float(responses.square().sum(dtype=torch.float64)))

            arguments = self.stream.call_arguments(block, (hidden.shape[0], hidden.shape[1]))
            upstream = self.upstream[shard.index, position]
            result = block_backward(module, arguments, hidden, upstream, sites, switch=self.switch, observer=observe)
            self.upstream[shard.index, position] = result.gradients
        num_tokens = shard.tokens.numel()
        return {
            name: {choice: 0.5 * math.fsum(parts) / num_tokens for choice, parts in of.items()}
            for name, of in squares.items()
        }


def _errors(W: Float[Tensor, "d_out d_in"], rounded: Sequence[QuantizedWeight]) -> dict[Choice, Tensor]:
    """dW of every choice, flat, float32, where the weight lies."""
    return {q.choice: (_beside(W, q).dequantize(W.dtype) - W).flatten() for q in rounded}


def _beside(W: Tensor, q: QuantizedWeight) -> QuantizedWeight:
    return QuantizedWeight(codes=q.codes.to(W.device), scales=q.scales.to(W.device), choice=q.choice)


def _responses(
    x: Float[Tensor, "tokens d_in"], g: Float[Tensor, "tokens d_out"], n: int, errors: Mapping[Choice, Tensor]
) -> dict[Choice, Float[Tensor, "windows=n"]]:
    """<G, dW> of every window and choice."""
    G = torch.bmm(widen(g).view(n, -1, g.shape[-1]).mT, widen(x).view(n, -1, x.shape[-1])).flatten(1)
    return {choice: G @ dW.to(G.dtype) for choice, dW in errors.items()}
