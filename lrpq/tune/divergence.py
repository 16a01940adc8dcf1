"""The loss of a tuning, KL(original || quantized), and its gradients behind the last block.

The original is kept as the input of its head: its logits are computed again whenever they are needed, a chunk of tokens
at a time. As in `lrpq.evaluate.divergence`, the last token of a window, for which nothing is predicted, is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lrpq.relevance.passes import widen
from lrpq.tune.part import Gradients

if TYPE_CHECKING:
    from jaxtyping import Float

CHUNK_TOKENS = 256
"""Rows of logits at a time: 50 MB each for a vocabulary of 50,000 in float32."""


class Top(nn.Module):
    """What follows the last block; its parameters are ``tail.0.weight``, ..., ``head.weight``.

    Args:
        tail: modules between the last block and the head, in order.
        head: the head.
        logits: from the head's input to logits, by a call of ``head``; some models cap them.
    """

    def __init__(self, tail: Sequence[nn.Module], head: nn.Module, logits: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.tail = nn.Sequential(*tail)
        self.head = head
        self._logits = (logits,)  # a tuple: as an attribute, a module would be registered twice

    def forward(self, x: Float[Tensor, "*n h"], part: str) -> Tensor:
        """The ``tail`` of hidden states, or the ``logits`` of what the tail gives."""
        return cast("Tensor", self.tail(x)) if part == "tail" else self._logits[0](x)


def kl_gradient(
    p: Float[Tensor, "k vocab"], q: Float[Tensor, "k vocab"]
) -> tuple[Float[Tensor, "rows=k"], Float[Tensor, "k vocab"]]:
    """KL(softmax p || softmax q) of every row, in nats, and its gradient at the logits q: softmax q - softmax p."""
    log_p, log_q = widen(p).log_softmax(-1), widen(q).log_softmax(-1)
    probability = log_p.exp()
    nats = (probability * (log_p - log_q)).sum(-1)
    return nats, log_q.exp_().sub_(probability)


@torch.no_grad()
def divergence(
    top: Top,
    tensors: dict[str, Tensor],
    original_head: dict[str, Tensor],
    hidden: Float[Tensor, "n t h"],
    original: Float[Tensor, "n t h"],
) -> Float[Tensor, "windows=n"]:
    """KL of every window in nats a token, float64.

    Args:
        top: the modules.
        tensors: the quantized model's tensors of ``top``.
        original_head: the original's, of the head.
        hidden: output of the quantized model's last block.
        original: input of the original's head.
    """
    normed = functional_call(top, tensors, (hidden, "tail"))
    nats = torch.zeros(len(hidden), dtype=torch.float64, device=hidden.device)
    for i, rows in _chunks(hidden):
        p = functional_call(top, original_head, (original[i, rows], "logits"))
        q = functional_call(top, tensors, (normed[i, rows], "logits"))
        nats[i] += kl_gradient(p, q)[0].sum(dtype=torch.float64)
    return nats / (hidden.shape[1] - 1)


def divergence_gradient(
    top: Top,
    tensors: dict[str, Tensor],
    original_head: dict[str, Tensor],
    hidden: Float[Tensor, "n t h"],
    original: Float[Tensor, "n t h"],
    *,
    trained: Sequence[str],
    gradients: Gradients,
    weight: float,
) -> tuple[Float[Tensor, "n t h"], Float[Tensor, "windows=n"]]:
    """Gradient of weight * sum of the windows' KL at the last block's output, and the KL as `divergence` gives it.

    Args:
        top: the modules.
        tensors: the quantized model's tensors of ``top``.
        original_head: the original's, of the head.
        hidden: output of the quantized model's last block.
        original: input of the original's head.
        trained: names in ``tensors`` whose gradients are wanted.
        gradients: where they are added.
        weight: of a window.
    """
    leaves = {key: tensors[key].detach().requires_grad_() for key in trained}
    used = {**tensors, **leaves}
    of_head = [key for key in trained if key.startswith("head.")]
    of_tail = [key for key in trained if key not in of_head]
    predicted = hidden.shape[1] - 1
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_()
        normed = functional_call(top, used, (leaf, "tail"))
    upstream = torch.zeros_like(normed)
    nats = torch.zeros(len(hidden), dtype=torch.float64, device=hidden.device)
    for i, rows in _chunks(hidden):
        with torch.no_grad():
            p = functional_call(top, original_head, (original[i, rows], "logits"))
        with torch.enable_grad():
            z = normed[i, rows].detach().requires_grad_()
            q = functional_call(top, used, (z, "logits"))
        kl, d_logits = kl_gradient(p, q.detach())
        nats[i] += kl.sum(dtype=torch.float64)
        d_logits.mul_(weight / predicted)
        found = torch.autograd.grad(q, [z, *(leaves[key] for key in of_head)], d_logits.to(q.dtype))
        upstream[i, rows] = found[0]
        for key, gradient in zip(of_head, found[1:], strict=True):
            gradients.add(key, gradient)
    found = torch.autograd.grad(normed, [leaf, *(leaves[key] for key in of_tail)], upstream)
    for key, gradient in zip(of_tail, found[1:], strict=True):
        gradients.add(key, gradient)
    return found[0], nats / predicted


def _chunks(hidden: Tensor) -> list[tuple[int, slice]]:
    n, t, _ = hidden.shape
    return [
        (i, slice(start, min(start + CHUNK_TOKENS, t - 1))) for i in range(n) for start in range(0, t - 1, CHUNK_TOKENS)
    ]
