"""Answer questions: log-likelihoods of the original and a checkpoint, batches shared out over the workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lrpq.evaluate.divergence import VARIANT
from lrpq.evaluate.tasks import Continuation, micro_batches, score_continuations
from lrpq.transform.changed import UNCHANGED, Change
from tasks.cluster import Pool, WorkerState
from tasks.evaluate import checkpoint_weights
from tasks.streams import open_reference

STAGE = "tasks"
BATCH_TOKENS = 4096
"""Tokens computed at once. A constant: batches decide the last bits, so they depend on no machine."""
PASS_BYTES = 1 << 30
"""States of a worker in one pass over the blocks; more questions make more passes."""
STATES = 3
"""Kept at once: the embeddings, and what each of the two models made of them."""

Pass = list[list[Continuation]]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionsJob:
    """The two models; the same on every worker."""

    model: str
    """Local folder of the original."""
    dtype: str
    """``float32`` or ``bfloat16``: weights and activations."""
    checkpoint: str
    """Folder of the checkpoint."""
    change: Change = UNCHANGED
    """How the original was changed before it was compressed."""


def score(state: WorkerState, job: QuestionsJob, batches: Pass) -> dict[str, list[float]]:
    """Log-likelihoods of one pass over the blocks, by model, in the order of the batches."""
    stream, other = open_reference(state, model=job.model, dtype=job.dtype, change=job.change)
    weights = checkpoint_weights(other or stream, Path(job.checkpoint))
    return score_continuations(stream, batches, {VARIANT: weights}, other=other)


def score_all(
    pool: Pool,
    job: QuestionsJob,
    continuations: Sequence[Continuation],
    *,
    hidden_bytes: int,
    announce: Callable[[int], None],
    advance: Callable[[], None],
) -> Mapping[str, list[float]]:
    """Log-likelihoods of all continuations, by model, in their order.

    Args:
        pool: the workers.
        job: the models.
        continuations: what is scored; a batch's numbers do not depend on the number of workers.
        hidden_bytes: bytes of one token's state.
        announce: is told the number of passes.
        advance: is called after each.
    """
    batches = micro_batches(continuations, max_tokens=BATCH_TOKENS)
    sizes = [_padded_tokens([continuations[i] for i in batch]) for batch in batches]
    at_once = min(PASS_BYTES // (STATES * hidden_bytes), -(-sum(sizes) // len(pool)))
    passes = _cut(batches, sizes, max_tokens=at_once)
    announce(len(passes))
    scores: dict[str, list[float]] = {}
    items = [(job, [[continuations[i] for i in batch] for batch in group]) for group in passes]
    for position, found in pool.map(score, items):
        order = [i for batch in passes[position] for i in batch]
        for name, values in found.items():
            of_all = scores.setdefault(name, [0.0] * len(continuations))
            for index, value in zip(order, values, strict=True):
                of_all[index] = value
        advance()
    return scores


def _padded_tokens(batch: Sequence[Continuation]) -> int:
    reads = {continuation.read for continuation in batch}
    return len(reads) * max(map(len, reads))


def _cut(batches: Sequence[tuple[int, ...]], sizes: Sequence[int], *, max_tokens: int) -> list[list[tuple[int, ...]]]:
    """Neighbouring batches together, as long as they hold ``max_tokens`` at most; a larger batch is alone."""
    found: list[list[tuple[int, ...]]] = []
    held = 0
    for batch, size in zip(batches, sizes, strict=True):
        if not found or held + size > max_tokens:
            found.append([])
            held = 0
        found[-1].append(batch)
        held += size
    return found
