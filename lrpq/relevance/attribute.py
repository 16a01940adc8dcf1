"""The backward sweep's work at the head and inside one decoder block.

The model is never whole in memory: someone else brings the head, then one block at a time, last block first,
and carries the gradients from one to the next. Here, for each of them: recompute the forward once with a
gradient on the input only, run one backward pass per `Pass` through that one graph, and keep what the
quantizer needs: the input of every site, and sums of squared output gradients over channels (token relevance)
and over tokens (curvature).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lrpq.errors import QuantizationError
from lrpq.relevance.composite import Relevance as Relevance
from lrpq.relevance.composite import apply_rules
from lrpq.relevance.rules import Pass, PassSwitch

if TYPE_CHECKING:
    from jaxtyping import Float, Int

IGNORED_LABEL = -100  # PyTorch's own marker
DEFAULT_FLOOR = 0.03  # the prototype's; keeps H well conditioned where few tokens hold most of the relevance

SeedGradient = Callable[[Tensor, Tensor], Tensor]
"""From logits [k, v] (fp32 or wider) and labels [k], none negative, to the gradient [k, v] at the logits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleStats:
    """Sums over the squared output gradients g^2 [n*t, d_out] of one linear layer in one micro-batch."""

    d_out: int
    token_sums: Mapping[Pass, Float[Tensor, " tokens"]]
    """sum_j g_tj^2 of every pass, fp32 (fp64 for an fp64 model); zero where a pass holds the layer constant:
    q, k and gate under CP_LRP."""
    channel_sums: Float[Tensor, " d_out"]
    """sum_t g_tj^2 of the FISHER pass, fp64; divided by the number of tokens it is the curvature c."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockBackward:
    """What one block gives for one micro-batch."""

    gradients: Mapping[Pass, Float[Tensor, "n t h"]]
    """Gradients at the block's input, dtype of the hidden states: upstream of the block before."""
    inputs: Mapping[str, Float[Tensor, "tokens d_in"]]
    """Input of every site, model dtype; tokens in the order of hidden.reshape(n*t, h)."""
    modules: Mapping[str, ModuleStats]
    """By module name as given in ``sites``."""


def sequence_generator(seed: int, index: int) -> torch.Generator:
    """CPU generator for the labels of the sequence with the global number ``index``.

    A function of (seed, index) alone, whatever shard, micro-batch, worker or device the sequence meets.
    SHA-256 because Python's own hash is salted in each process.
    """
    digest = hashlib.sha256(f"lrpq labels {seed}:{index}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def sample_labels(logits: Float[Tensor, "t v"], generator: torch.Generator) -> Tensor:
    """Draw one label a token, int64 [t], from softmax(logits), as the true Fisher information asks.

    By inversion of the cumulative distribution in float64 with one uniform number a token from ``generator``
    (on the CPU): the labels do not depend on how the tokens are cut into chunks.
    """
    uniform = torch.rand(logits.shape[0], dtype=torch.float64, generator=generator).to(logits.device)
    cumulative = torch.softmax(_widen(logits), dim=-1).to(torch.float64).cumsum_(dim=-1)
    threshold = (uniform * cumulative[:, -1]).unsqueeze(-1)
    # right=True: never a label of probability zero, whose cumulative value equals its predecessor's
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp_(max=logits.shape[-1] - 1)


def nll_seed(logits: Float[Tensor, "k v"], labels: Tensor) -> Float[Tensor, "k v"]:
    """Gradient of the summed negative log-likelihood (nats) with respect to the logits: softmax - one-hot."""
    gradient = torch.softmax(logits, dim=-1)
    gradient[torch.arange(len(labels), device=labels.device), labels] -= 1.0
    return gradient


def logit_seed(logits: Float[Tensor, "k v"], labels: Tensor) -> Float[Tensor, "k v"]:
    """Gradient of the summed logits of the labels: relevance then explains, and sums to, these logits."""
    return torch.zeros_like(logits).scatter_(-1, labels.unsqueeze(-1), 1.0)


def head_gradient(
    norm: nn.Module,
    head: nn.Module,
    hidden: Float[Tensor, "n t h"],
    *,
    switch: PassSwitch,
    passes: Collection[Pass],
    generators: Sequence[torch.Generator] | None = None,
    labels: Int[Tensor, "n t"] | None = None,
    seed: SeedGradient = nll_seed,
    chunk_tokens: int = 256,
) -> tuple[dict[Pass, Float[Tensor, "n t h"]], float]:
    """Gradients at the last block's output for every pass, and the labels' negative log-likelihood in nats.

    The loss is a sum over tokens, so that gradients do not depend on the size of the micro-batch. At most
    ``chunk_tokens`` rows of logits exist at a time. Only ``norm`` has rules, which are applied here.

    Args:
        norm: final norm.
        head: normalised hidden states [k, h] -> logits [k, v], differentiated as it is.
        hidden: output of the last block.
        switch: switch of the sweep.
        passes: passes to run.
        generators: one per sequence (`sequence_generator`): labels are sampled from the model's own softmax.
        labels: or given labels, `IGNORED_LABEL` for tokens without loss.
        seed: gradient at the logits.
        chunk_tokens: bound on the rows of logits at a time.

    Raises:
        QuantizationError: labels and hidden states do not fit each other, or a gradient is not finite.
    """
    n, t, _ = hidden.shape
    if (labels is None) == (generators is None):
        raise QuantizationError("head: expected either labels or generators to sample them; give exactly one")
    if (labels is not None and labels.shape != (n, t)) or (generators is not None and len(generators) != n):
        raise QuantizationError(
            f"head: hidden states have {n} x {t} tokens; expected labels of that shape or {n} generators"
        )
    with _rules(norm, switch, passes), torch.enable_grad():
        leaf = hidden.detach().requires_grad_()
        normed = norm(leaf)
    upstream = torch.empty_like(normed)
    total_nats = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for i in range(n):
        for start in range(0, t, chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            with torch.enable_grad():
                z = normed[i, rows].detach().requires_grad_()
                logits = head(z)
            wide = _widen(logits.detach())
            if generators is not None:
                chunk = sample_labels(wide, generators[i])
            elif labels is not None:
                chunk = labels[i, rows].to(wide.device)
            ignored = chunk < 0
            chunk = chunk.clamp(min=0)
            nats = wide.logsumexp(-1) - wide.gather(-1, chunk.unsqueeze(-1)).squeeze(-1)
            total_nats += nats.masked_fill(ignored, 0.0).sum(dtype=torch.float64)
            d_logits = seed(wide, chunk).masked_fill_(ignored.unsqueeze(-1), 0.0)
            (upstream[i, rows],) = torch.autograd.grad(logits, z, d_logits.to(logits.dtype))
    gradients = _run_passes(normed, leaf, dict.fromkeys(passes, upstream), switch)
    _check_finite({("final norm", running): g for running, g in gradients.items()})
    return gradients, float(total_nats)


def block_backward(
    block: nn.Module,
    call_args: Mapping[str, Any],
    hidden: Float[Tensor, "n t h"],
    upstream: Mapping[Pass, Float[Tensor, "n t h"]],
    sites: Mapping[str, Sequence[tuple[str, nn.Module]]],
    *,
    switch: PassSwitch,
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

    Raises:
        QuantizationError: the arguments do not allow it, or a gradient is not finite; see the messages.
        ModelError: a module has no rule (`apply_rules`).
    """
    _check_arguments(block, call_args, upstream)
    named = [(site, name, module) for site, members in sites.items() for name, module in members]
    recorder = _Recorder(switch=switch)
    with _rules(block, switch, upstream), _recording(recorder, named), torch.enable_grad():
        leaf = hidden.detach().requires_grad_()
        output = block(leaf, **call_args)
        output = output[0] if isinstance(output, tuple) else output
    for _, name, _ in named:
        if name not in recorder.widths:
            raise QuantizationError(
                f"{name} did not run in its block's forward: expected every listed layer to see the tokens; "
                "leave it out of the sites"
            )
    gradients = _run_passes(output, leaf, upstream, switch)
    _check_finite(recorder.token_sums)
    return BlockBackward(
        gradients=gradients,
        inputs=recorder.inputs,
        modules={name: recorder.stats(name, upstream) for _, name, _ in named},
    )


def token_weights(
    modules: Sequence[ModuleStats],
    relevance: Relevance,
    *,
    site: str,
    floor: float = DEFAULT_FLOOR,
    power: float = 1.0,
) -> Tensor:
    """Weights s_t [tokens] of a site's tokens in H = sum_t s_t x_t x_t^T: fp32 (fp64 for fp64), non-negative.

    Of one module, s_t = mean_j g_tj^2 of the pass. The absolute scale is kept: it says what a token counts
    against those of other micro-batches. BLEND is sqrt(s^fisher s^lrp) of each module, rescaled so that its
    mean over the micro-batch is the Fisher's (the scale of the LRP pass cancels). The site's s is the plain
    average over its modules; ``floor`` times its mean over the micro-batch is then added, and the sum is raised to
    ``power``. Below 1 the power flattens the weights: with few tokens, sharp ones fit the codes to the calibration
    text. NONE: ones.

    Raises:
        QuantizationError: the weights are not finite, or all zero, which no Hessian can use.
    """
    if relevance is Relevance.NONE:
        return torch.ones_like(modules[0].token_sums[Pass.FISHER])
    weights = torch.stack([_module_weights(stats, relevance) for stats in modules]).mean(dim=0)
    weights = (weights + floor * weights.mean()).pow(power)
    if not (bool(torch.isfinite(weights).all()) and bool(weights.sum() > 0)):
        raise QuantizationError(
            f"site {site}: the {relevance.value} weights of its tokens are not finite or all zero; expected "
            "a positive sum; check the model's values, or use relevance none"
        )
    return weights


def relevance_sum(hidden: Float[Tensor, "n t h"], gradient: Float[Tensor, "n t h"]) -> Float[Tensor, "n t"]:
    """Relevance of each token at this place of the model: sum over channels of activation x gradient."""
    total: Tensor = (_widen(hidden) * _widen(gradient)).sum(dim=-1)
    return total


@dataclass(slots=True)
class _Recorder:
    """Filled by the hooks while the block runs forward and backward."""

    switch: PassSwitch
    inputs: dict[str, Tensor] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)
    token_sums: dict[tuple[str, Pass], Tensor] = field(default_factory=dict)
    channel_sums: dict[str, Tensor] = field(default_factory=dict)

    def forward_hook(self, site: str, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            x = args[0].detach()
            known = self.inputs.setdefault(site, x.reshape(-1, x.shape[-1]))
            if name in self.widths or known.data_ptr() != x.data_ptr() or known.numel() != x.numel():
                raise QuantizationError(
                    f"site {site}: {name} ran twice or reads another tensor than the site's first module; "
                    "expected one call on one shared input; give it a site of its own"
                )
            self.widths[name] = output.shape[-1]
            output.register_hook(lambda g: self.accumulate(name, g))  # type: ignore[no-untyped-call]

        return hook

    def accumulate(self, name: str, g: Tensor | None) -> None:
        if g is None:  # the running pass holds this layer constant
            return
        # Cast before squaring: in bf16 the squares would keep three digits and their sums fewer.
        squares = _widen(g).square().reshape(-1, g.shape[-1])
        self.token_sums[name, self.switch.current] = squares.sum(dim=-1)
        if self.switch.current is Pass.FISHER:
            self.channel_sums[name] = squares.sum(dim=0, dtype=torch.float64)

    def stats(self, name: str, passes: Collection[Pass]) -> ModuleStats:
        constant = torch.zeros_like(self.token_sums[name, Pass.FISHER])
        return ModuleStats(
            d_out=self.widths[name],
            token_sums={running: self.token_sums.get((name, running), constant) for running in passes},
            channel_sums=self.channel_sums[name],
        )


@contextmanager
def _recording(recorder: _Recorder, named: Sequence[tuple[str, str, nn.Module]]) -> Iterator[None]:
    handles = [m.register_forward_hook(recorder.forward_hook(site, name)) for site, name, m in named]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rules(module: nn.Module, switch: PassSwitch, passes: Collection[Pass]) -> AbstractContextManager[None]:
    return nullcontext() if set(passes) == {Pass.FISHER} else apply_rules(module, switch)


def _run_passes(
    output: Tensor, leaf: Tensor, upstream: Mapping[Pass, Tensor], switch: PassSwitch
) -> dict[Pass, Tensor]:
    """Gradients at ``leaf``; the last pass frees the graph."""
    gradients: dict[Pass, Tensor] = {}
    for number, (running, g) in enumerate(upstream.items(), start=1):
        with switch.running(running):
            (gradients[running],) = torch.autograd.grad(
                output, leaf, g.to(output.dtype), retain_graph=number < len(upstream)
            )
    return gradients


def _module_weights(stats: ModuleStats, relevance: Relevance) -> Tensor:
    s: dict[Pass, Tensor] = {running: stats.token_sums[running] / stats.d_out for running in relevance.passes}
    if relevance is not Relevance.BLEND:
        return s[relevance.passes[-1]]
    blend = s[Pass.FISHER].sqrt() * s[Pass.LRP].sqrt()  # the root of the product would underflow in fp32
    mean = blend.mean()
    # A mean of zero: no token matters to both passes, and there is nothing to rescale.
    return torch.where(mean > 0, blend * (s[Pass.FISHER].mean() / mean), blend)


def _widen(x: Tensor) -> Tensor:
    wide: Tensor = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide


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


def _check_finite(tensors: Mapping[tuple[str, Pass], Tensor]) -> None:
    """Raise, naming the first tensor that is not finite; one transfer from the device for all."""
    finite = torch.stack([torch.isfinite(tensor).all() for tensor in tensors.values()]).tolist()
    for (name, running), good in zip(tensors, finite, strict=True):
        if not good:
            raise QuantizationError(
                f"{name}: the gradient of the {running.value} pass is not finite; load the model in bfloat16 "
                "or float32, or check its weights"
            )
