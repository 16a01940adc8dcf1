"""The backward sweep's work inside one decoder block.

The model is never whole in memory: someone else brings one block at a time, last block first, and carries the gradients
from one to the next. Here: recompute the forward once with a gradient on the input only, run one backward pass per
`Pass` through that one graph, and keep what the quantizer needs: the input of every site, and sums of squared output
gradients over channels (token relevance) and over tokens (curvature).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lrpq.errors import QuantizationError
from lrpq.model.experts import RoutedLinear
from lrpq.quant.activation_sums import channel_squares, is_split, token_squares
from lrpq.relevance.passes import check_finite, rules_for, run_passes, widen
from lrpq.relevance.rules import Pass, PassSwitch

if TYPE_CHECKING:
    from jaxtyping import Float, Int


_RUN = 32
"""Tokens whose squared gradients are summed in fp32."""
Observer = Callable[[str, Pass, Tensor, Tensor, Tensor], None]
"""Called in every pass for every listed layer with its name, the pass, its input [tokens, d_in], its output and the
gradient at its output [tokens, d_out], all in the model's dtype and detached; a layer held constant is not reported."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleStats:
    """Sums over the squared output gradients g^2 [n*t, d_out] of one linear layer in one micro-batch."""

    d_out: int
    token_sums: Mapping[Pass, Float[Tensor, " tokens"]]
    """sum_j g_tj^2 of every pass, fp32 (fp64 for an fp64 model); zero where a pass holds the layer constant:
    q, k and gate under CP_LRP. Of an expert: of the tokens it was run on."""
    channel_sums: Float[Tensor, " d_out"]
    """sum_t g_tj^2 of the FISHER pass, fp64; divided by the number of tokens it is the curvature c."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockBackward:
    """What one block gives for one micro-batch."""

    gradients: Mapping[Pass, Float[Tensor, "n t h"]]
    """Gradients at the block's input, dtype of the hidden states: upstream of the block before."""
    inputs: Mapping[str, Float[Tensor, "tokens d_in"]]
    """Input of every site, model dtype; tokens in the order of hidden.reshape(n*t, h)."""
    rows: Mapping[str, Int[Tensor, " tokens"]]
    """Of the sites of experts: which of the n*t tokens those are. Others see all tokens and are not named."""
    modules: Mapping[str, ModuleStats]
    """By module name as given in ``sites``. An expert to which no token was sent is in none of the three."""


def block_backward(
    block: nn.Module,
    call_args: Mapping[str, Any],
    hidden: Float[Tensor, "n t h"],
    upstream: Mapping[Pass, Float[Tensor, "n t h"]],
    sites: Mapping[str, Sequence[tuple[str, nn.Module]]],
    *,
    switch: PassSwitch,
    observer: Observer | None = None,
) -> BlockBackward:
    """Recompute ``block`` on ``hidden`` and send every gradient of ``upstream`` through that one graph.

    Costs one forward and one backward to activations per pass; gradients of weights are never computed. Rules
    are applied here, only for passes other than FISHER: an architecture without rules still has its Fisher.

    Args:
        block: decoder block in evaluation mode, its rules applied already or not.
        call_args: keyword arguments of the block besides the hidden states, without a key-value cache.
        hidden: the block's input.
        upstream: gradient at the block's output for every pass to run; FISHER among them.
        sites: site name -> modules (name for the result, module) that read the same input.
        switch: switch of the sweep.
        observer: sees inputs, outputs and gradients while they exist; metrics that need more than sums of squares.

    Raises:
        QuantizationError: the arguments do not allow it, or a gradient is not finite; see the messages.
        ModelError: a module has no rule (`apply_rules`).
    """
    _check_arguments(block, call_args, upstream)
    named = [(site, name, module) for site, members in sites.items() for name, module in members]
    recorder = _Recorder(switch=switch, observer=observer)
    with rules_for(block, switch, upstream), _recording(recorder, named), torch.enable_grad():
        leaf = hidden.detach().requires_grad_()
        output = block(leaf, **call_args)
        output = output[0] if isinstance(output, tuple) else output
    for _, name, module in named:
        if name not in recorder.widths and not isinstance(module, RoutedLinear):
            raise QuantizationError(
                f"{name} did not run in its block's forward: expected every listed layer to see the tokens; "
                "leave it out of the sites"
            )
    gradients = run_passes(output, leaf, upstream, switch)
    check_finite(recorder.token_sums)
    return BlockBackward(
        gradients=gradients,
        inputs=recorder.inputs,
        rows=recorder.rows,
        modules={name: recorder.stats(name, upstream) for name in recorder.widths},
    )


def relevance_sum(hidden: Float[Tensor, "n t h"], gradient: Float[Tensor, "n t h"]) -> Float[Tensor, "n t"]:
    """Relevance of each token at this place of the model: sum over channels of activation x gradient."""
    total: Tensor = (widen(hidden) * widen(gradient)).sum(dim=-1)
    return total


@dataclass(slots=True)
class _Recorder:
    """Filled by the hooks while the block runs forward and backward."""

    switch: PassSwitch
    observer: Observer | None = None
    inputs: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)
    token_sums: dict[tuple[str, Pass], Tensor] = field(default_factory=dict)
    channel_sums: dict[str, Tensor] = field(default_factory=dict)

    def forward_hook(self, site: str, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            x = args[0].detach()
            if isinstance(module, RoutedLinear) and module.rows is not None:
                self.rows[site] = module.rows
            known = self.inputs.setdefault(site, x.reshape(-1, x.shape[-1]))
            if name in self.widths or known.data_ptr() != x.data_ptr() or known.numel() != x.numel():
                raise QuantizationError(
                    f"site {site}: {name} ran twice or reads another tensor than the site's first module; "
                    "expected one call on one shared input; give it a site of its own"
                )
            self.widths[name] = output.shape[-1]
            seen = None if self.observer is None else (known, output.detach().flatten(0, -2))
            output.register_hook(lambda g: self.accumulate(name, g, seen))  # type: ignore[no-untyped-call]

        return hook

    def accumulate(self, name: str, g: Tensor | None, seen: tuple[Tensor, Tensor] | None) -> None:
        if g is None:  # the running pass holds this layer constant
            return
        running = self.switch.current
        flat = g.detach().flatten(0, -2)
        if is_split(flat):
            self.token_sums[name, running] = token_squares(flat)
            if running is Pass.FISHER:
                self.channel_sums[name] = channel_squares(flat)
        else:  # cast before squaring: in bf16 the squares would keep three digits and their sums fewer
            squares = widen(flat).square()
            self.token_sums[name, running] = squares.sum(dim=-1)
            if running is Pass.FISHER:
                self.channel_sums[name] = sum_over_tokens(squares)
        if self.observer is not None and seen is not None:
            self.observer(name, running, *seen, flat)

    def stats(self, name: str, passes: Collection[Pass]) -> ModuleStats:
        constant = torch.zeros_like(self.token_sums[name, Pass.FISHER])
        return ModuleStats(
            d_out=self.widths[name],
            token_sums={running: self.token_sums.get((name, running), constant) for running in passes},
            channel_sums=self.channel_sums[name],
        )


def sum_over_tokens(squares: Float[Tensor, "tokens d_out"]) -> Float[Tensor, "columns=d_out"]:
    """Column sums of squares, fp64.

    Runs of 32 tokens are summed in their own dtype first, which loses less than 2^-18 of a sum of fp32 squares: a CPU
    sums columns of fp32 numbers into fp64 at a seventh of the speed.
    """
    whole = len(squares) // _RUN * _RUN
    runs = squares[:whole].reshape(whole // _RUN, _RUN, squares.shape[1]).sum(dim=1)
    return torch.cat([runs, squares[whole:]]).double().sum(dim=0)


@contextmanager
def _recording(recorder: _Recorder, named: Sequence[tuple[str, str, nn.Module]]) -> Iterator[None]:
    handles = [m.register_forward_hook(recorder.forward_hook(site, name)) for site, name, m in named]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_arguments(block: nn.Module, call_args: Mapping[str, Any], passes: Collection[Pass]) -> None:
    name = type(block).__name__
    if Pass.FISHER not in passes:
        raise QuantizationError(
            f"{name}: no upstream gradient for the fisher pass, which gives the curvature: add it to upstream"
        )
    if block.training:
        raise QuantizationError(
            f"{name} is in training mode; dropout would change what is recomputed: call eval() on it"
        )
    if call_args.get("past_key_values") is not None:
        raise QuantizationError(
            f"{name} got a key-value cache, to which recomputing would append: capture with use_cache=False"
        )
