"""Log-likelihoods of choices against whole plain models, and what is made of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CASES, VOCABULARY, build_model, write_tiny
from torch import Tensor

from lrpq.errors import CheckpointError
from lrpq.evaluate import tasks
from lrpq.evaluate.tasks import (
    AnswerKey,
    Continuation,
    compared,
    micro_batches,
    score_continuations,
    summarize_task,
)
from lrpq.model.source import open_source
from lrpq.model.streaming import BlockStream
from tasks import question_scores
from tasks.question_scores import QuestionsJob, score_all
from tasks.worker import Place, WorkerState

LENGTHS = ((1, 1), (3, 2), (12, 1), (30, 7), (5, 5), (2, 20), (17, 3))
"""Tokens of a context and of its continuations."""


def continuations(seed: int = 0) -> list[Continuation]:
    """Two for each of LENGTHS, and two of one token that share all that is read."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, VOCABULARY - 5, (n,), generator=generator).tolist())

    found = []
    for before, after in LENGTHS:
        context = tokens(before)
        found += [Continuation(context=context, tokens=tokens(after)) for _ in range(2)]
    return found


def batched(items: Sequence[Continuation], *, max_tokens: int) -> tuple[list[list[Continuation]], list[int]]:
    batches = micro_batches(items, max_tokens=max_tokens)
    return [[items[i] for i in batch] for batch in batches], [i for batch in batches for i in batch]


def scored(
    stream: BlockStream, items: Sequence[Continuation], *, max_tokens: int, variants: Mapping[str, Any] | None = None
) -> dict[str, list[float]]:
    """In the order of the items."""
    batches, order = batched(items, max_tokens=max_tokens)
    found = score_continuations(stream, batches, variants or {})
    return {name: [values[order.index(i)] for i in range(len(items))] for name, values in found.items()}


@torch.no_grad()
def plain_log_likelihood(model: Any, item: Continuation) -> float:
    """One sequence alone through the whole model."""
    logits = model(torch.tensor([item.context + item.tokens])).logits[0].float().log_softmax(-1)
    first = len(item.context)
    return math.fsum(float(logits[first - 1 + k, token]) for k, token in enumerate(item.tokens))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("task-scores") / "llama", "llama")


@pytest.fixture
def stream(llama: Path) -> BlockStream:
    return BlockStream(open_source(llama), dtype=torch.float32)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "opt", "gpt-neox", "gpt2", "mixtral"])
def test_log_likelihoods_are_those_of_the_plain_model(name: str, tmp_path: Path) -> None:
    """With sliding windows of 8, capped logits, learned positions and experts, whatever a sequence is padded with."""
    stream = BlockStream(open_source(write_tiny(tmp_path / name, name)), dtype=torch.float32)
    model = build_model(CASES[name])
    items = continuations()
    wanted = [plain_log_likelihood(model, item) for item in items]
    assert max(wanted) - min(wanted) > 10
    for max_tokens in (1, 100, 10_000):  # one by one, some together, all together
        found = scored(stream, items, max_tokens=max_tokens)["reference"]
        assert found == pytest.approx(wanted, rel=1e-5, abs=1e-5)


def test_padding_changes_nothing_before_it(stream: BlockStream, monkeypatch: pytest.MonkeyPatch) -> None:
    items = continuations()
    found = []
    for padding in (0, 17):
        monkeypatch.setattr(tasks, "PADDING", padding)
        found.append(scored(stream, items, max_tokens=10_000)["reference"])
    assert found[0] == found[1]  # bit for bit


def test_the_head_is_computed_in_pieces(stream: BlockStream, monkeypatch: pytest.MonkeyPatch) -> None:
    items = continuations()
    whole = scored(stream, items, max_tokens=10_000)["reference"]
    monkeypatch.setattr(tasks, "HEAD_POSITIONS", 4)
    assert scored(stream, items, max_tokens=10_000)["reference"] == pytest.approx(whole, abs=1e-5)


def by_block(weights: Mapping[str, Tensor], blocks: int) -> Callable[[int], dict[str, Tensor]]:
    def of_block(block: int) -> dict[str, Tensor]:
        prefix = f"model.layers.{block}." if block < blocks else "lm_head"
        return {name: W for name, W in weights.items() if name.startswith(prefix)}

    return of_block


def test_a_variant_is_the_model_with_its_weights(stream: BlockStream) -> None:
    model, items = build_model(CASES["llama"]), continuations()
    original = [plain_log_likelihood(model, item) for item in items]
    weights = {}
    for name in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj", "lm_head"):
        parameter = model.get_submodule(name).weight
        weights[name] = parameter.detach() * 0.7
        parameter.data = weights[name]
    wanted = [plain_log_likelihood(model, item) for item in items]
    found = scored(stream, items, max_tokens=100, variants={"variant": by_block(weights, stream.num_blocks)})
    assert found["variant"] == pytest.approx(wanted, rel=1e-5, abs=1e-5)
    assert found["reference"] == pytest.approx(original, rel=1e-5, abs=1e-5)
    assert all(abs(a - b) > 1e-3 for a, b in zip(*found.values(), strict=True))


def test_logits_that_are_not_finite_are_an_error(stream: BlockStream) -> None:
    broken = {"model.layers.1.mlp.down_proj": torch.full((64, 96), math.nan)}
    with pytest.raises(CheckpointError, match="broken: logits are not finite on the questions"):
        scored(stream, continuations(), max_tokens=100, variants={"broken": by_block(broken, 2)})


# --- batches --------------------------------------------------------------------------------------


def test_batches_hold_every_continuation_once_and_no_more_than_allowed() -> None:
    items = continuations() + continuations(1)
    for max_tokens in (1, 40, 200):
        batches = micro_batches(items, max_tokens=max_tokens)
        assert sorted(i for batch in batches for i in batch) == list(range(len(items)))
        lengths = [[len(items[i].read) for i in batch] for batch in batches]
        for batch, of_batch in zip(batches, lengths, strict=True):
            rows = len({items[i].read for i in batch})
            assert rows == 1 or rows * max(of_batch) <= max_tokens
        assert all(max(a) <= min(b) for a, b in pairwise(lengths))  # similar ones together
    assert micro_batches([], max_tokens=8) == []


def test_choices_of_one_token_share_what_is_read(stream: BlockStream, monkeypatch: pytest.MonkeyPatch) -> None:
    embedded: list[tuple[int, ...]] = []
    embed = stream.embed
    monkeypatch.setattr(stream, "embed", lambda tokens: embedded.append(tuple(tokens.shape)) or embed(tokens))
    items = [Continuation(context=(5, 6, 7), tokens=(token,)) for token in (8, 9, 10)]
    assert micro_batches(items, max_tokens=3) == [(0, 1, 2)]
    found = scored(stream, items, max_tokens=3)["reference"]
    assert embedded == [(1, 3)]
    model = build_model(CASES["llama"])
    assert found == pytest.approx([plain_log_likelihood(model, item) for item in items], abs=1e-5)


class Here:
    """Stands for a pool of workers."""

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def __len__(self) -> int:
        return self.workers

    def map(self, function: Callable[..., Any], items: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        state = WorkerState(device="cpu", threads=1, kept_bytes=0, place=Place(index=0, num_workers=1, epoch=0))
        for position in reversed(range(len(items))):  # they end in any order
            yield position, function(state, *items[position])


def test_scores_do_not_depend_on_the_workers_or_the_passes(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # another checkpoint in its place: the identity
    monkeypatch.setattr(question_scores, "checkpoint_weights", lambda stream, folder: lambda block: {})
    monkeypatch.setattr(question_scores, "BATCH_TOKENS", 60)
    items = continuations() + continuations(1)
    job = QuestionsJob(model=str(llama), dtype="float32", checkpoint="none")
    found, passes = [], []
    for workers, hidden_bytes in ((1, 1), (3, 1), (1, 1 << 23)):
        advanced: list[None] = []
        pool: Any = Here(workers)
        scores = score_all(
            pool,
            job,
            items,
            hidden_bytes=hidden_bytes,
            announce=passes.append,
            advance=lambda advanced=advanced: advanced.append(None),
        )
        assert len(advanced) == passes[-1]
        found.append(scores)
    assert passes[0] == 1 < passes[1] < passes[2]
    assert found[0] == found[1] == found[2]  # bit for bit
    assert found[0]["variant"] == found[0]["reference"]
    model = build_model(CASES["llama"])
    assert found[0]["reference"] == pytest.approx([plain_log_likelihood(model, item) for item in items], abs=1e-4)


# --- arithmetic -----------------------------------------------------------------------------------

KEYS = [
    AnswerKey(label=0, num_characters=(2, 8)),
    AnswerKey(label=1, num_characters=(4, 2, 2)),
    AnswerKey(label=1, num_characters=(5, 5)),
    AnswerKey(label=0, num_characters=(3, 3)),
]
REFERENCE = [[-2.0, -4.0], [-3.0, -1.0, -9.0], [-2.0, -1.0], [-5.0, -1.0]]
CHECKPOINT = [[-2.0, -1.0], [-3.0, -1.0, -9.0], [-1.0, -2.0], [-5.0, -1.0]]


def test_accuracies_by_hand() -> None:
    """Answers by sum: reference 0 1 1 1, checkpoint 1 1 0 1; by sum a character: reference 1 1 1 1, checkpoint 1 1 0 1.

    The labels are 0 1 1 0.
    """
    found = summarize_task(KEYS, REFERENCE, CHECKPOINT)
    assert found.questions == 4
    assert found.chance == pytest.approx((1 / 2 + 1 / 3 + 1 / 2 + 1 / 2) / 4)
    assert list(found.measures) == ["acc", "acc_norm"]
    acc, norm = found.measures["acc"], found.measures["acc_norm"]
    assert (acc.reference.mean, acc.checkpoint.mean, acc.difference.mean, acc.agreement) == (0.75, 0.25, -0.5, 0.5)
    assert (norm.reference.mean, norm.checkpoint.mean, norm.difference.mean, norm.agreement) == (0.5, 0.25, -0.25, 0.75)
    assert acc.reference.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    assert norm.reference.standard_error == pytest.approx(math.sqrt(0.5 * 0.5 / 3))
    # differences of acc: -1 0 -1 0; their variance is 1/3
    assert acc.difference.standard_error == pytest.approx(math.sqrt(1 / 3 / 4))


def test_labels_decide() -> None:
    """With other labels the same log-likelihoods are other accuracies; answers, and so agreement, know no labels."""
    other = [AnswerKey(label=1 - key.label, num_characters=key.num_characters) for key in KEYS]
    found = summarize_task(other, REFERENCE, CHECKPOINT).measures["acc"]
    assert (found.reference.mean, found.checkpoint.mean, found.agreement) == (0.25, 0.75, 0.5)


def test_the_paired_difference_is_surer_than_two_errors() -> None:
    values = [float(i % 2) for i in range(100)]
    found = compared(values, [*values[:-1], 0.0])
    assert found.difference.mean == pytest.approx(-0.01)
    assert found.difference.standard_error == pytest.approx(0.01)
    assert found.reference.standard_error == pytest.approx(math.sqrt(0.25 / 99))


def test_equal_choices_and_a_single_question() -> None:
    (key,) = [AnswerKey(label=1, num_characters=(1, 1))]
    found = summarize_task([key], [[-1.0, -1.0]], [[-1.0, -0.5]]).measures["acc"]
    assert (found.reference.mean, found.checkpoint.mean) == (0.0, 1.0)  # of equal ones the first
    assert found.difference.standard_error is None
