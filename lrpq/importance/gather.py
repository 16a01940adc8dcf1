"""One walk back through the model that gives every measure of importance its evidence, block by block.

The forward sweep and the seeds are the profile's (lrpq.relevance.sweep). In the backward sweep a block's Hessians under
all wanted token weightings, its curvatures and its gradients are summed; then its layers are quantized at every choice,
the measures are evaluated, and all but their values is dropped. Memory: that of the profile, times the number of
weightings, and one block's candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lrpq.errors import ModelError
from lrpq.importance.moments import InputMoments, empty_moments
from lrpq.importance.weightings import GRADIENTS, WEIGHTINGS, SiteTokens
from lrpq.model.host_memory import release_freed_memory
from lrpq.model.layers import LinearSpec
from lrpq.quant.grid import QuantizedWeight
from lrpq.quant.hessian import HessianSum, accumulate, empty_hessian
from lrpq.quant.matched_curvature import bounded_sum
from lrpq.relevance.attribute import block_backward, sum_over_tokens
from lrpq.relevance.head import IGNORED_LABEL
from lrpq.relevance.outputs import Outputs, add_outputs, empty_outputs, merge_outputs
from lrpq.relevance.passes import widen
from lrpq.relevance.rules import Pass
from lrpq.relevance.sweep import ProfileSweep
from lrpq.relevance.weights import squared_gradients
from lrpq.shards import Node, fold, root

if TYPE_CHECKING:
    from jaxtyping import Float, Int

Rounded = Callable[[LinearSpec, Tensor], Sequence[QuantizedWeight]]
"""From a layer and its weight to ways of rounding it."""


@dataclass(slots=True, kw_only=True)
class ModuleSums:
    """Sums over tokens of one module."""

    squares: dict[Pass, Float[Tensor, " d_out"]]
    """sum_t g_tj^2 (float64); zero where a pass holds the layer constant (q, k and gate under CP-LRP)."""
    trace: Tensor
    """sum_t |g_t|^2 |x_t|^2, Fisher pass (float64)."""
    windows: list[Float[Tensor, " windows"]] = field(default_factory=list)
    """The same of every window, by micro-batch; until the block is walked back."""
    share: Tensor | float = 1.0
    """Of the trace that is left when windows are bounded, of the model as it was walked back."""
    inputs: InputMoments | None = None
    """Of the inputs, tokens weighted by |g_t|^2 of the Fisher pass; only in a walk for activations."""
    relevance: Tensor
    """sum_t sum_j |y_tj g_tj|, LRP pass (float64)."""
    gradient: Float[Tensor, "d_out d_in"] | None = None
    """sum_t g_t x_t^T, Fisher pass; only while its block is walked back."""
    gradient_change: list[float] | None = None
    """sum |G o dW| for each way of rounding, G the gradient's mean over tokens."""
    output_error: Tensor | None = None
    """sum_t sum_j g_tj^2 dy_tj^2 for each way of rounding (float64)."""


@dataclass(slots=True, kw_only=True)
class BlockEvidence:
    """Sums over tokens of one block."""

    modules: dict[str, ModuleSums]
    hessians: dict[str, dict[str, HessianSum]]
    """Weighting -> site -> sums; of the weightings that were asked for."""
    weights: dict[str, dict[str, Float[Tensor, " tokens"]]]
    """Weighting -> site -> s of all tokens, on the host."""
    squares: dict[str, Float[Tensor, " tokens"]]
    """Site -> mean squared gradient of all tokens, on the host; only in a walk for activations."""
    outputs: dict[str, Outputs]
    """Module -> second moments of the Fisher pass's gradients at its outputs; empty unless asked for."""
    num_tokens: int
    """As the first block has them: the same number for all blocks."""
    cosine: float | None
    """mean_t cos(block input, block output); None where a block's outputs are not its inputs' tokens."""


class GatherSweep(ProfileSweep):
    """The profile's sweep with more to see in its backward half; one shard.

    Args:
        weightings: token weightings to find; names of WEIGHTINGS.
        hessians_by: those of them whose Hessians are summed.
        extra_passes: backward passes besides those that the weightings need.
        outputs_by: windows of every shard of the run, where the second moments of the gradients at outputs are wanted
            too; summed as the profile sums them.
        text_labels: explain the text's own tokens instead of sampled labels.
        **profile: as for ProfileSweep.

    Raises:
        ModelError: a model with experts, which see only some of the tokens.
    """

    def __init__(
        self,
        *arguments: Any,
        weightings: Sequence[str],
        hessians_by: Collection[str] = (),
        extra_passes: Collection[Pass] = (),
        outputs_by: Sequence[range] = (),
        text_labels: bool = False,
        **profile: Any,
    ) -> None:
        super().__init__(*arguments, **profile)
        if any(spec.routed for spec in self.stream.specs):
            raise ModelError("measures of importance are gathered for dense models only; this one has experts")
        if text_labels and self.stream.family.pooling is not None:
            raise ModelError("a measure that explains the text's own tokens has nothing to explain in images")
        self.weightings = tuple(weightings)
        self.hessians_by = frozenset(hessians_by)
        self.text_labels = text_labels
        self.outputs_by = tuple(outputs_by)
        wanted = {Pass.FISHER, *extra_passes}
        for name in self.weightings:
            wanted.update(GRADIENTS[name].passes if name in GRADIENTS else ())
        self.passes = tuple(running for running in Pass if running in wanted)

    def labels(self, first: int, tokens: Int[Tensor, "n t"]) -> dict[str, Any]:
        """Sampled labels, or of every token the one that follows it in the text."""
        if not self.text_labels:
            return super().labels(first, tokens)
        following = torch.full_like(tokens, IGNORED_LABEL)
        following[:, :-1] = tokens[:, 1:]
        return {"labels": following}

    def gather(self, block: int, module: nn.Module, *, rounded: Rounded | None = None) -> BlockEvidence:
        """Walk one block back; last block first.

        Args:
            block: its index.
            module: the block with its weights.
            rounded: ways of rounding every layer, whose gradient changes and output errors are then found too.
        """
        stream, (shard,) = self.stream, self.shards
        self.expect(block)
        sites = {
            site: [(spec.name, module.get_submodule(stream.local_name(spec))) for spec in members]
            for site, members in stream.sites(block).items()
        }
        specs = stream.block_specs(block)
        found = BlockEvidence(
            modules={spec.name: self._empty(spec) for spec in specs},
            hessians={
                name: {
                    site: empty_hessian(m[0].d_in, stream.device, with_first=self.for_activations)
                    for site, m in stream.sites(block).items()
                }
                for name in self.hessians_by
            },
            weights={name: {} for name in self.weightings},
            squares={},
            outputs={},
            num_tokens=0,
            cosine=None,
        )
        changes: dict[str, Tensor] = {}
        if rounded is not None:
            for spec in specs:
                W = stream.weight(spec)
                changes[spec.name] = torch.stack([W - q.dequantize(W.dtype) for q in rounded(spec, W)])

        outputs: dict[str, dict[Node, Outputs]] = {
            spec.name: {(0, i): empty_outputs(spec.d_out, stream.device) for i in range(len(self.outputs_by))}
            for spec in specs
        }
        first, windows, rows = 0, 0, 0
        cosines: list[Tensor] = []

        def observe(name: str, running: Pass, x: Tensor, y: Tensor, g: Tensor) -> None:
            _add(found.modules[name], running, x, y, widen(g), windows, changes.get(name))
            if running is Pass.FISHER:
                self._add_outputs(outputs[name], first, windows, g)

        pieces: dict[tuple[str, str], list[Tensor]] = {}
        squares: dict[str, list[Tensor]] = {}
        for position in range(len(shard.tokens.split(self.micro_batch))):
            hidden = self.kept.take((block, shard.index, position))
            windows = len(hidden)
            found.num_tokens += stream.num_tokens(block, hidden)
            rows += hidden.shape[0] * hidden.shape[1]
            arguments = stream.call_arguments(block, (hidden.shape[0], hidden.shape[1]))
            with _recorded(module, self.stream.family.units, "attention" in self.weightings) as seen:
                upstream = self.upstream[shard.index, position]
                result = block_backward(
                    module, arguments, hidden, upstream, sites, switch=self.switch, observer=observe
                )
            self.upstream[shard.index, position] = result.gradients
            first += windows
            if seen.output.shape == hidden.shape:
                cosine = torch.cosine_similarity(hidden.float(), seen.output.float(), dim=-1)
                cosines.append(cosine.double().sum())
            for site, x in result.inputs.items():
                tokens = SiteTokens(
                    site=f"{block}.{site}",
                    stats=[result.modules[name] for name, _ in sites[site]],
                    x=x,
                    attention=seen.attention,
                    floor=self.floor,
                    power=self.power,
                )
                for name in self.weightings:
                    s = WEIGHTINGS[name](tokens)
                    if name in self.hessians_by:
                        found.hessians[name][site] = accumulate(found.hessians[name][site], x, s)
                    pieces.setdefault((name, site), []).append(s.float())
                if self.for_activations:
                    g2 = squared_gradients(tokens.stats, site=tokens.site)
                    squares.setdefault(site, []).append(g2.float())
        for (name, site), parts in pieces.items():
            found.weights[name][site] = torch.cat(parts).cpu()  # a GPU is waited for here, not at each micro-batch
        found.squares |= {site: torch.cat(parts).cpu() for site, parts in squares.items()}
        for sums in found.modules.values():
            _finish_trace(sums, bounded=stream.family.pooling is None)
        for name, dW in changes.items():
            _finish_gradient(found.modules[name], dW, found.num_tokens)
        found.cosine = sum(torch.stack(cosines).tolist()) / rows if cosines else None
        if self.outputs_by:
            num = len(self.outputs_by)
            found.outputs |= {
                name: root(fold(parts, num, merge_outputs), num, merge_outputs) for name, parts in outputs.items()
            }
        release_freed_memory()
        return found

    def _add_outputs(
        self, parts: dict[Node, Outputs], first: int, windows: int, g: Float[Tensor, "tokens d_out"]
    ) -> None:
        """Add gradients of consecutive windows, ``windows`` of them from ``first``, to the shards they belong to."""
        length, last = len(g) // windows, first + windows
        for index, members in enumerate(self.outputs_by):
            start, stop = max(first, members.start), min(last, members.stop)
            if start < stop:
                add_outputs(parts[0, index], g[(start - first) * length : (stop - first) * length])

    def _empty(self, spec: LinearSpec) -> ModuleSums:
        device = self.stream.device
        return ModuleSums(
            squares={p: torch.zeros(spec.d_out, dtype=torch.float64, device=device) for p in self.passes},
            trace=torch.zeros((), dtype=torch.float64, device=device),
            relevance=torch.zeros((), dtype=torch.float64, device=device),
            inputs=empty_moments(spec.d_in, device) if self.for_activations else None,
        )


def _add(
    sums: ModuleSums,
    running: Pass,
    x: Tensor,
    y: Tensor,
    g: Float[Tensor, "tokens d_out"],
    num_windows: int,
    changes: Float[Tensor, "choices d_out d_in"] | None,
) -> None:
    squares = g.square()
    total = sum_over_tokens(squares)
    sums.squares[running] += total
    if running is Pass.LRP:
        sums.relevance += (widen(y) * g).abs().sum(dtype=torch.float64)
    if running is not Pass.FISHER:
        return
    x = widen(x)
    sums.windows.append((squares.sum(1).double() * x.square().sum(1).double()).view(num_windows, -1).sum(1))
    if sums.inputs is not None:
        sums.inputs = sums.inputs.plus(x, squares.sum(1))
    if changes is not None:
        gradient = g.T @ x
        sums.gradient = gradient if sums.gradient is None else sums.gradient.add_(gradient)
        error = torch.stack([((x @ dW.T).square() * squares).sum(dtype=torch.float64) for dW in changes])
        sums.output_error = error if sums.output_error is None else sums.output_error + error


def _finish_trace(sums: ModuleSums, *, bounded: bool) -> None:
    """From windows to their sum, and to what of it is left when they are bounded; images have one label each, and are
    not."""
    windows = torch.cat([sums.trace.new_zeros(1), *sums.windows])
    sums.trace = windows.sum()
    if bounded:
        sums.share = torch.where(sums.trace > 0, bounded_sum(windows) / sums.trace, 1.0)
    sums.windows = []


def _finish_gradient(sums: ModuleSums, changes: Float[Tensor, "choices d_out d_in"], num_tokens: int) -> None:
    """From the gradient of the weights to what is wanted of it: a model's gradients are as large as the model."""
    if sums.gradient is None:
        sums.gradient_change = [0.0] * len(changes)
        return
    mean = sums.gradient / num_tokens
    sums.gradient_change = [float((mean * dW).abs().sum(dtype=torch.float64)) for dW in changes]
    sums.gradient = None


@dataclass(slots=True)
class _Seen:
    output: Tensor
    attention: Tensor | None = None


@contextmanager
def _recorded(block: nn.Module, units: Sequence[Any], with_attention: bool) -> Iterator[_Seen]:
    """Note the block's output and, of its attention, what every token receives."""
    seen = _Seen(output=torch.empty(0))

    def note_output(_: nn.Module, __: Any, output: Any) -> None:
        seen.output = (output[0] if isinstance(output, tuple) else output).detach()

    def note_attention(_: nn.Module, __: Any, output: Any) -> None:
        if output[1] is None:
            raise ModelError("the attention of this model does not return its weights; open it with attention 'eager'")
        seen.attention = output[1].detach().float().sum((1, 2))

    handles = [block.register_forward_hook(note_output)]
    if with_attention:
        found = [unit.path for unit in units if unit.returns_tuple]
        if len(found) != 1:
            raise ModelError("attention weights: this architecture names no attention module that returns them")
        handles.append(block.get_submodule(found[0]).register_forward_hook(note_attention))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def means(evidence: BlockEvidence) -> Mapping[str, dict[Pass, Tensor]]:
    """Curvature c of every module and pass: mean over tokens, float64."""
    return {
        name: {running: total / evidence.num_tokens for running, total in sums.squares.items()}
        for name, sums in evidence.modules.items()
    }
