"""Perplexity and KL divergence of quantized variants to the original, all streamed block by block together.

Every block is read once; the original and all variants go through it one after the other. Scores are kept per window,
so that standard errors and paired differences can be computed. Memory: one block's weights twice; in the end, the head
and every head that replaces it, and one window's logits of the original and of one variant, in the model's dtype. They
are widened and compared a run of rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrpq.errors import CheckpointError
from lrpq.model.host_memory import release_freed_memory
from lrpq.model.streaming import BlockStream

if TYPE_CHECKING:
    from jaxtyping import Float, Int

ORIGINAL = "reference"
VARIANT = "variant"
RUN_ELEMENTS = 1 << 21
"""Logits compared at once: their log-probabilities and what is made of them take five times 8 MB."""
BlockWeights = Callable[[int], Mapping[str, Tensor]]
"""Block index -> the variant's dense weights by module name; modules that are not named keep the original's.

The number of blocks asks for the head's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowScore:
    """Scores of one window of one variant, means over its predicted tokens."""

    nll_nats: float
    """Negative log-likelihood of the text."""
    kl_nats: float
    """KL(original || variant)."""
    top1: float
    """Share of positions where both models' likeliest tokens agree."""


@torch.no_grad()
def score_windows(
    stream: BlockStream,
    windows: Int[Tensor, "windows length"],
    variants: Mapping[str, BlockWeights],
    *,
    micro_batch: int = 1,
    other: BlockStream | None = None,
) -> dict[str, list[WindowScore]]:
    """Score the original (under the name "reference") and every variant on every window.

    Args:
        stream: the original model.
        windows: token ids; the first token of a window is context only.
        variants: name -> weights.
        micro_batch: windows computed at once.
        other: the model whose variants they are, if it is another one with the same vocabulary, such as a rotated one.

    Raises:
        CheckpointError: a variant gives logits that are not finite.
    """
    batches = list(windows.split(micro_batch))
    if other is None:
        hidden = final_states(stream, batches, {ORIGINAL: None, **variants})
    else:
        hidden = final_states(stream, batches, {ORIGINAL: None}) | final_states(other, batches, variants)
    of_variants = other or stream
    scores: dict[str, list[WindowScore]] = {name: [] for name in hidden}
    heads = {
        name: {module: W.to(of_variants.device) for module, W in weights(of_variants.num_blocks).items()}
        for name, weights in variants.items()
    }
    with stream.head() as ours, nullcontext(ours) if other is None else other.head() as theirs:
        for position, batch in enumerate(batches):
            for row, tokens in enumerate(batch.to(stream.device)):

                def logits(name: str, position: int = position, row: int = row) -> Float[Tensor, "t vocab"]:
                    norm, head = ours if name == ORIGINAL else theirs
                    with of_variants.swapped_head(heads.get(name, {})):
                        return head(norm(hidden[name][position][row][None]))[0, :-1]

                original = logits(ORIGINAL)
                for name in hidden:
                    quantized = original if name == ORIGINAL else logits(name)
                    scores[name].append(_window_score(name, original, quantized, tokens[1:]))
                    release_freed_memory()
    return scores


def final_states(
    stream: BlockStream, batches: Sequence[Tensor], variants: Mapping[str, BlockWeights | None]
) -> dict[str, list[Tensor]]:
    """Output of the last block, by variant and batch of tokens; a variant without weights is the model as it is."""
    with stream.embedding():
        embedded = [stream.embed(batch) for batch in batches]
    hidden = {name: list(embedded) for name in variants}
    for index, block in stream.stream(range(stream.num_blocks)):
        for name, weights in variants.items():
            with stream.swapped(block, {} if weights is None else weights(index)):
                hidden[name] = [stream.run(block, index, h) for h in hidden[name]]
        release_freed_memory()  # of the block and what replaced it
    return hidden


def rows_compared(vocabulary: int) -> int:
    """Positions whose logits are compared at once."""
    return max(1, RUN_ELEMENTS // vocabulary)


def _window_score(
    name: str, original: Float[Tensor, "t vocab"], variant: Float[Tensor, "t vocab"], y: Tensor
) -> WindowScore:
    runs = range(0, len(y), rows_compared(variant.shape[-1]))
    rows = [slice(start, start + runs.step) for start in runs]
    nll, kl, agree = zip(*(_compared(original[run], variant[run], y[run]) for run in rows), strict=True)
    found = WindowScore(
        nll_nats=float(torch.cat(nll).mean()),
        kl_nats=float(torch.cat(kl).mean()),
        top1=float(torch.cat(agree).float().mean()),
    )
    if not math.isfinite(found.nll_nats) or not math.isfinite(found.kl_nats):
        raise CheckpointError(f"variant {name}: logits are not finite on the evaluation text")
    return found


def _compared(
    original: Float[Tensor, "t vocab"], variant: Float[Tensor, "t vocab"], y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of every position: negative log-likelihood of its token, KL(original || variant), whether both agree."""
    p, q = (logits.float().log_softmax(-1) for logits in (original, variant))
    kl = (p.exp() * (p - q)).sum(-1)
    return -q.gather(-1, y[:, None])[:, 0], kl, p.argmax(-1) == q.argmax(-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Scores over all windows."""

    perplexity: float
    kl_nats: float
    """Mean over windows, nats per token."""
    kl_standard_error: float | None
    """Of the mean over windows; None with one window."""
    top1: float


def summarize(scores: Sequence[WindowScore]) -> Summary:
    """Means over windows, with the standard error of the KL divergence."""
    n = len(scores)
    kl = [s.kl_nats for s in scores]
    mean = math.fsum(kl) / n
    deviation = math.sqrt(math.fsum((k - mean) ** 2 for k in kl) / (n - 1)) if n > 1 else None
    return Summary(
        perplexity=math.exp(math.fsum(s.nll_nats for s in scores) / n),
        kl_nats=mean,
        kl_standard_error=None if deviation is None else deviation / math.sqrt(n),
        top1=math.fsum(s.top1 for s in scores) / n,
    )
