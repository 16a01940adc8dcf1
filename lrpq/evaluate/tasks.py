"""Multiple-choice questions: how likely a model finds each choice after its context, and how often it is right.

A question is answered with the choice of the largest log-likelihood (``acc``), or of the largest log-likelihood a
character of the choice (``acc_norm``), as in EleutherAI's lm-evaluation-harness (Gao et al.).

The original and its variants go through each block together, as in `divergence`. Sequences are padded on the right
and no mask is given: in a causal model no position reads a later one. The one exception are rotary frequencies that
depend on the longest sequence of a batch (Phi-3 beyond its original context), where a sequence gets those of its batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrpq.errors import CheckpointError
from lrpq.evaluate.divergence import ORIGINAL, BlockWeights, final_states
from lrpq.model.streaming import BlockStream

if TYPE_CHECKING:
    from jaxtyping import Float, Int

PADDING = 0
"""Any token of the vocabulary: nothing reads it."""
HEAD_POSITIONS = 128
"""Positions whose logits are in memory at once: 78 MB of float32 at 152k tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """Tokens whose likelihood after a context is wanted."""

    context: tuple[int, ...]
    """At least one token."""
    tokens: tuple[int, ...]
    """At least one token."""

    @property
    def read(self) -> tuple[int, ...]:
        """What the model reads to predict all of ``tokens``."""
        return self.context + self.tokens[:-1]


def micro_batches(continuations: Sequence[Continuation], *, max_tokens: int) -> list[tuple[int, ...]]:
    """Indices of continuations that are computed at once: those of similar length, at most ``max_tokens`` with padding.

    Continuations that make the model read the same (choices of one token) share a row, so they share a batch. One that
    is longer than ``max_tokens`` is a batch of its own.
    """
    sharing: dict[tuple[int, ...], list[int]] = {}
    for index, continuation in enumerate(continuations):
        sharing.setdefault(continuation.read, []).append(index)
    batches: list[tuple[int, ...]] = []
    batch: list[int] = []
    rows = 0
    for read in sorted(sharing, key=len):  # stable, so the order of the questions decides among equals
        if batch and (rows + 1) * len(read) > max_tokens:
            batches.append(tuple(batch))
            batch, rows = [], 0
        batch += sharing[read]
        rows += 1
    return [*batches, tuple(batch)] if batch else batches


@torch.no_grad()
def score_continuations(
    stream: BlockStream,
    batches: Sequence[Sequence[Continuation]],
    variants: Mapping[str, BlockWeights],
    *,
    other: BlockStream | None = None,
) -> dict[str, list[float]]:
    """Log-likelihoods in nats, of the original (under the name "reference") and of every variant, in the order given.

    Memory: one block's weights twice, and the states [tokens, h] of all batches once a model and once more. The numbers
    of a batch do not depend on the other batches.

    Args:
        stream: the original model.
        batches: as from `micro_batches`.
        variants: name -> weights.
        other: the model whose variants they are, if it is another one with the same vocabulary, such as a rotated one.

    Raises:
        CheckpointError: a model gives logits that are not finite.
    """
    padded = [_padded(batch) for batch in batches]
    read, rows = [tokens for tokens, _ in padded], [rows for _, rows in padded]
    if other is None:
        return _from_states(stream, batches, rows, final_states(stream, read, {ORIGINAL: None, **variants}), variants)
    original = _from_states(stream, batches, rows, final_states(stream, read, {ORIGINAL: None}), {})
    return original | _from_states(other, batches, rows, final_states(other, read, variants), variants)


def _from_states(
    stream: BlockStream,
    batches: Sequence[Sequence[Continuation]],
    rows: Sequence[list[int]],
    hidden: Mapping[str, Sequence[Tensor]],
    variants: Mapping[str, BlockWeights],
) -> dict[str, list[float]]:
    """Log-probabilities of all continuations under every model whose last hidden states these are; one head for all."""
    scores: dict[str, list[float]] = {}
    with stream.head() as (norm, head):
        for name, states in hidden.items():
            weights = variants[name](stream.num_blocks) if name in variants else {}
            swapped = {module: W.to(stream.device) for module, W in weights.items()}
            with stream.swapped_head(swapped):
                scores[name] = []
                for batch, of_batch, h in zip(batches, rows, states, strict=True):
                    found = []
                    for states_now, wanted in _predicting(batch, of_batch, h):
                        log_probabilities = head(norm(states_now[None]))[0].float().log_softmax(-1)
                        found.append(log_probabilities.gather(-1, wanted[:, None])[:, 0])
                    of_tokens = torch.cat(found).tolist()
                    if not all(map(math.isfinite, of_tokens)):
                        raise CheckpointError(f"{name}: logits are not finite on the questions")
                    rest = iter(of_tokens)
                    scores[name] += [math.fsum(islice(rest, len(continuation.tokens))) for continuation in batch]
    return scores


def _padded(batch: Sequence[Continuation]) -> tuple[Int[Tensor, "n t"], list[int]]:
    """What the model reads, one row for all continuations that share it; and each continuation's row."""
    rows: dict[tuple[int, ...], int] = {}
    row_of = [rows.setdefault(continuation.read, len(rows)) for continuation in batch]
    tokens = torch.full((len(rows), max(map(len, rows))), PADDING)
    for read, row in rows.items():
        tokens[row, : len(read)] = torch.tensor(read)
    return tokens, row_of


def _predicting(
    batch: Sequence[Continuation], rows: Sequence[int], hidden: Float[Tensor, "n t h"]
) -> list[tuple[Float[Tensor, "k h"], Tensor]]:
    """The states that predict the continuations' tokens, one after the other, and those k tokens; in pieces."""
    row: list[int] = []
    position: list[int] = []
    wanted: list[int] = []
    for continuation, in_row in zip(batch, rows, strict=True):
        row += [in_row] * len(continuation.tokens)
        first = len(continuation.context) - 1
        position += range(first, first + len(continuation.tokens))
        wanted += continuation.tokens
    pieces = torch.tensor([row, position, wanted], device=hidden.device)
    starts = range(0, len(wanted), HEAD_POSITIONS)
    cut = (pieces[:, start : start + HEAD_POSITIONS] for start in starts)
    return [(hidden[rows_now, positions], tokens) for rows_now, positions, tokens in cut]


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerKey:
    """What a question's log-likelihoods are held against."""

    label: int
    """Position of the right choice."""
    num_characters: tuple[int, ...]
    """Of every choice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over questions."""

    mean: float
    standard_error: float | None
    """From the questions' sample variance: for shares sqrt(p (1 - p) / (n - 1)), as in lm-evaluation-harness. None with
    one question; 0 where all are alike, which says little where they are few."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One measure of both models on the same questions."""

    reference: Estimate
    checkpoint: Estimate
    difference: Estimate
    """Checkpoint - reference, paired: its error is that of the questions' differences."""
    agreement: float | None
    """Share of questions that both answer alike, right or wrong; None where answers are not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSummary:
    """Both models on one set of questions."""

    questions: int
    chance: float | None
    """Expected share of right answers of a guess; None where it is not known."""
    measures: Mapping[str, Comparison]
    """By name: ``acc`` and ``acc_norm``."""


def summarize_task(
    keys: Sequence[AnswerKey], reference: Sequence[Sequence[float]], checkpoint: Sequence[Sequence[float]]
) -> TaskSummary:
    """Both models' accuracies; log-likelihoods are given a question, a choice. Of equal choices the first is taken."""
    measures: dict[str, Comparison] = {}
    for name, normalized in (("acc", False), ("acc_norm", True)):
        answers = [
            [_answer(scores, key, normalized=normalized) for key, scores in zip(keys, of_all, strict=True)]
            for of_all in (reference, checkpoint)
        ]
        right = [[float(a == key.label) for a, key in zip(given, keys, strict=True)] for given in answers]
        alike = math.fsum(a == b for a, b in zip(*answers, strict=True)) / len(keys)
        measures[name] = compared(*right, agreement=alike)
    chance = math.fsum(1 / len(key.num_characters) for key in keys) / len(keys)
    return TaskSummary(questions=len(keys), chance=chance, measures=measures)


def compared(reference: Sequence[float], checkpoint: Sequence[float], *, agreement: float | None = None) -> Comparison:
    """Means of a measure's values, one a question, and the paired difference."""
    return Comparison(
        reference=_estimate(reference),
        checkpoint=_estimate(checkpoint),
        difference=_estimate([b - a for a, b in zip(reference, checkpoint, strict=True)]),
        agreement=agreement,
    )


def _answer(log_likelihoods: Sequence[float], key: AnswerKey, *, normalized: bool) -> int:
    lengths = key.num_characters if normalized else (1,) * len(key.num_characters)
    scores = [score / length for score, length in zip(log_likelihoods, lengths, strict=True)]
    return scores.index(max(scores))


def _estimate(values: Sequence[float]) -> Estimate:
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean=mean, standard_error=None)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return Estimate(mean=mean, standard_error=math.sqrt(variance / n))
