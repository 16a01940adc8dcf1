"""``lrpq evaluate --tasks``: from what was asked to accuracies, by the task's name."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from flows.progress import Progress
from lrpq.errors import ConfigError
from tasks.harness import PREFIX, HarnessTask, parse_harness_task
from tasks.questions import QuestionFile, read_questions

if TYPE_CHECKING:
    from lrpq.evaluate.tasks import Continuation
    from tasks.cluster import Pool
    from tasks.question_scores import QuestionsJob

Encoded: TypeAlias = "Mapping[str, list[list[Continuation]]]"
"""Name of a file -> its questions -> the tokens of their choices."""
Task: TypeAlias = QuestionFile | HarnessTask
"""What one ``--tasks`` asks for."""


def read_tasks(texts: Sequence[str]) -> dict[str, Task]:
    """Name -> task, files read and checked; a file goes by its name without the ending, where no two share that.

    Raises:
        LrpqError: twice the same, a file that holds no questions, or a package that is missing.
    """
    twice = [text for text, count in Counter(texts).items() if count > 1]
    if twice:
        raise ConfigError(f"--tasks {twice[0]} is given twice; give it once")
    stems = Counter(Path(text).stem for text in texts)
    found: dict[str, Task] = {}
    for text in texts:
        if text.startswith(PREFIX):
            found[text] = parse_harness_task(text)
        else:
            path = Path(os.path.abspath(os.path.expanduser(text)))
            stem = Path(text).stem
            found[stem if stems[stem] == 1 else text] = read_questions(path)
    return found


def encoded_tasks(tasks: Mapping[str, Task], model: Path) -> Encoded:
    """Questions as tokens of the model, before anything is started.

    Raises:
        LrpqError: no tokenizer, or a question that the model cannot read.
    """
    files = {name: task for name, task in tasks.items() if isinstance(task, QuestionFile)}
    if not files:
        return {}
    from flows.calibrate import load_tokenizer
    from lrpq.model.safetensors_source import ModelSource
    from tasks.question_tokens import encode_questions

    tokenizer = load_tokenizer(model)
    config = ModelSource(model).config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    return {
        name: encode_questions(file, tokenizer, vocab_size=config.vocab_size, longest=longest)
        for name, file in files.items()
    }


def answer_tasks(
    pool: Pool, job: QuestionsJob, tasks: Mapping[str, Task], encoded: Encoded, progress: Progress
) -> dict[str, dict[str, Any]]:
    """Answer the questions of all files together; name -> accuracies.

    Args:
        pool: the workers.
        job: the two models.
        tasks: as asked.
        encoded: as from ``encoded_tasks``.
        progress: where it is reported.
    """
    from lrpq.evaluate.divergence import ORIGINAL, VARIANT
    from lrpq.evaluate.tasks import AnswerKey, summarize_task
    from lrpq.model.source import open_source
    from tasks import question_scores
    from tasks.streams import DTYPES

    started = time.monotonic()
    width = open_source(Path(job.model)).config.get_text_config().hidden_size
    scores = question_scores.score_all(
        pool,
        job,
        [continuation for questions in encoded.values() for question in questions for continuation in question],
        hidden_bytes=width * DTYPES[job.dtype].itemsize,
        announce=lambda passes: progress.stage(question_scores.STAGE, passes, "pass"),
        advance=lambda: progress.advance(question_scores.STAGE),
    )
    progress.done(question_scores.STAGE, seconds=time.monotonic() - started, reused=False)
    reference, checkpoint = iter(scores[ORIGINAL]), iter(scores[VARIANT])
    found: dict[str, dict[str, Any]] = {}
    for name in encoded:
        file = tasks[name]
        if not isinstance(file, QuestionFile):
            continue
        keys = [AnswerKey(label=q.label, num_characters=tuple(map(len, q.choices))) for q in file.questions]
        of_reference, of_checkpoint = (
            [[next(scored) for _ in question.choices] for question in file.questions]
            for scored in (reference, checkpoint)
        )
        summary = asdict(summarize_task(keys, of_reference, of_checkpoint))
        found[name] = {"source": str(file.path), "sha256": file.sha256, **summary}
    return found


def harness_tasks(
    tasks: Mapping[str, Task], *, model: Path, checkpoint: Path, device: str, progress: Progress
) -> dict[str, dict[str, Any]]:
    """Run the tasks of lm-evaluation-harness; name -> accuracies, a group of tasks under its members' names."""
    found: dict[str, dict[str, Any]] = {}
    for name, task in tasks.items():
        if not isinstance(task, HarnessTask):
            continue
        from tasks.harness import run_harness
        from tasks.opening import resolve_device

        started = time.monotonic()
        progress.stage(name, 2, "model")
        summaries = run_harness(
            task,
            reference=str(model),
            checkpoint=str(checkpoint),
            device=resolve_device(device),
            advance=lambda: progress.advance(name),  # noqa: B023 - called in this turn of the loop only
        )
        progress.done(name, seconds=time.monotonic() - started, reused=False)
        found |= {each: {"source": name, **asdict(summary)} for each, summary in summaries.items()}
    return found
