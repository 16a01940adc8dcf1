"""Where the backward sweep begins: labels sampled from the model itself, and the gradients they give at the last block.

Labels are drawn from the model's own softmax (the true Fisher information; with the text's tokens it would be the
empirical one). The loss is their negative log-likelihood, summed over tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lrpq.errors import QuantizationError
from lrpq.relevance.passes import check_finite, rules_for, run_passes, widen
from lrpq.relevance.rules import Pass, PassSwitch

if TYPE_CHECKING:
    from jaxtyping import Float, Int

LABEL_RUN = 256  # labels in a run: about the square root of a vocabulary of 50,000 to 130,000
IGNORED_LABEL = -100  # PyTorch's own marker
CHUNK_TOKENS, GPU_CHUNK_TOKENS = 256, 1024
"""Rows of logits at a time, some ten tensors of that size together: a GPU waits for launches with few of them."""

SeedGradient = Callable[[Tensor, Tensor], Tensor]
"""From logits [k, v] (fp32 or wider) and labels [k], none negative, to the gradient [k, v] at the logits."""


def sequence_generator(seed: int, index: int) -> torch.Generator:
    """CPU generator for the labels of the sequence with the global number ``index``.

    A function of (seed, index) alone, whatever shard, micro-batch, worker or device the sequence meets.
    SHA-256 because Python's own hash is salted in each process.
    """
    digest = hashlib.sha256(f"lrpq labels {seed}:{index}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def sample_labels(logits: Float[Tensor, "t v"], generator: torch.Generator) -> Tensor:
    """Draw one label a token, int64 [t], from softmax(logits), as the true Fisher information asks.

    By inversion of the cumulative distribution with one uniform number a token from ``generator`` (on the CPU): the
    labels do not depend on how the tokens are cut into chunks. In two levels, first the run of labels, then the label
    in it, with running sums in float64 as products with a triangle of ones: a plain running sum over the vocabulary is
    not deterministic on CUDA, and slow on a CPU.
    """
    t, num_labels = logits.shape
    uniform = torch.rand(t, dtype=torch.float64, generator=generator).to(logits.device)
    padding = -num_labels % LABEL_RUN
    p = nn.functional.pad(torch.softmax(widen(logits), dim=-1), (0, padding)).view(t, -1, LABEL_RUN)
    of_run = p.sum(-1, dtype=torch.float64)
    up_to_run = _running_sum(of_run)
    threshold = (uniform * up_to_run[:, -1]).unsqueeze(-1)
    run = _first(up_to_run > threshold, of_run)
    token = torch.arange(t, device=logits.device)
    inside = p[token, run].double()
    before = (up_to_run[token, run] - of_run[token, run]).unsqueeze(-1)
    return run * LABEL_RUN + _first(before + _running_sum(inside) > threshold, inside)


def _running_sum(x: Float[Tensor, "t n"]) -> Float[Tensor, "t n"]:
    return x @ torch.ones(x.shape[1], x.shape[1], dtype=x.dtype, device=x.device).triu()


def _first(reached: Tensor, p: Float[Tensor, "t n"]) -> Tensor:
    """Index of the first reached entry of positive probability; the likeliest where rounding left none."""
    possible = reached & (p > 0)
    return torch.where(possible.any(-1), possible.to(torch.uint8).argmax(-1), p.argmax(-1))


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
    head: Callable[[Tensor], Tensor],
    hidden: Float[Tensor, "n tokens h"],
    *,
    switch: PassSwitch,
    passes: Collection[Pass],
    generators: Sequence[torch.Generator] | None = None,
    labels: Int[Tensor, "n t"] | None = None,
    seed: SeedGradient = nll_seed,
    chunk_tokens: int | None = None,
) -> tuple[dict[Pass, Float[Tensor, "n tokens h"]], float]:
    """Gradients at the last block's output for every pass, and the labels' negative log-likelihood in nats.

    The loss is a sum over tokens, so that gradients do not depend on the size of the micro-batch. At most
    ``chunk_tokens`` rows of logits exist at a time. Only ``norm`` has rules, which are applied here.

    Args:
        norm: final norm.
        head: normalised hidden states [k, h] -> logits [k, v], differentiated as it is.
        hidden: output of the last block, its tokens are t but where ``norm`` pools them (image classifiers: t is 1).
        switch: switch of the sweep.
        passes: passes to run.
        generators: one per sequence (`sequence_generator`): labels are sampled from the model's own softmax.
        labels: or given labels, `IGNORED_LABEL` for tokens without loss.
        seed: gradient at the logits.
        chunk_tokens: bound on the rows of logits at a time; None for what suits the device.

    Raises:
        QuantizationError: labels and hidden states do not fit each other, or a gradient is not finite.
    """
    if (labels is None) == (generators is None):
        raise QuantizationError("head: expected either labels or generators to sample them; give exactly one")
    with rules_for(norm, switch, passes), torch.enable_grad():
        leaf = hidden.detach().requires_grad_()
        normed = norm(leaf)
    n, t, _ = normed.shape
    if (labels is not None and labels.shape != (n, t)) or (generators is not None and len(generators) != n):
        raise QuantizationError(
            f"head: hidden states have {n} x {t} tokens; expected labels of that shape or {n} generators"
        )
    if chunk_tokens is None:
        chunk_tokens = GPU_CHUNK_TOKENS if hidden.is_cuda else CHUNK_TOKENS
    upstream = torch.empty_like(normed)
    total_nats = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for i in range(n):
        for start in range(0, t, chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            with torch.enable_grad():
                z = normed[i, rows].detach().requires_grad_()
                logits = head(z)
            wide = widen(logits.detach())
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
    gradients = run_passes(normed, leaf, dict.fromkeys(passes, upstream), switch)
    check_finite({("final norm", running): g for running, g in gradients.items()})
    return gradients, float(total_nats)
