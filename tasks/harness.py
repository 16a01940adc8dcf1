"""``lm-eval:NAME[:LIMIT]``: a task of EleutherAI's lm-evaluation-harness, an optional package.

It fetches data sets from the hub and holds a whole model in memory, one after the other. lrpq's tests do not run
this adapter, for the package is not among what they install.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lrpq.errors import ConfigError

if TYPE_CHECKING:
    from lrpq.evaluate.tasks import TaskSummary

PREFIX = "lm-eval:"


@dataclass(frozen=True, slots=True, kw_only=True)
class HarnessTask:
    """A task or a group of tasks by its name in lm-evaluation-harness."""

    name: str
    limit: int | None = None
    """Questions a task, the first ones; None for all."""

    def __str__(self) -> str:
        return f"{PREFIX}{self.name}" + ("" if self.limit is None else f":{self.limit}")


def parse_harness_task(text: str) -> HarnessTask:
    """Read ``lm-eval:NAME[:LIMIT]`` and look for the package.

    Raises:
        ConfigError: written otherwise, or the package is not installed.
    """
    name, _, limit = text.removeprefix(PREFIX).partition(":")
    if not name or (":" in text.removeprefix(PREFIX) and not (limit.isascii() and limit.isdigit() and int(limit))):
        raise ConfigError(f"{text!r}: expected lm-eval:NAME or lm-eval:NAME:LIMIT, such as lm-eval:arc_easy:200")
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(f"{text}: needs the package lm-eval; pip install 'lrpq[tasks]', or give a file of questions")
    return HarnessTask(name=name, limit=int(limit) if limit else None)


def run_harness(
    task: HarnessTask, *, reference: str, checkpoint: str, device: str, advance: Callable[[], None]
) -> dict[str, TaskSummary]:
    """Both folders through ``simple_evaluate``; task -> every measure that is one number a question.

    Raises:
        ConfigError: lm-evaluation-harness failed (its reason is named), or has no such measure.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from lrpq.evaluate.tasks import TaskSummary, compared
    from lrpq.loading import register

    register()

    found: list[Mapping[str, Mapping[str, list[float]]]] = []
    for folder in (reference, checkpoint):
        try:
            model = HFLM(pretrained=folder, device=device, dtype="auto", trust_remote_code=False)
            result = simple_evaluate(model=model, tasks=[task.name], limit=task.limit, bootstrap_iters=0)
        except Exception as error:  # whatever the harness, the hub or the data set raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(
                f"{task} on {folder}: {reason}; check the name, and that the hub can be reached"
            ) from error
        found.append({name: _values(rows) for name, rows in result["samples"].items()})
        del model
        advance()
    ours, theirs = found
    summaries = {}
    for name, values in ours.items():
        measures = {m: compared(of_all, theirs[name][m]) for m, of_all in values.items()}
        if measures:
            questions = max(len(of_all) for of_all in values.values())
            limit = "" if task.limit is None else f":{task.limit}"
            summaries[f"{PREFIX}{name}{limit}"] = TaskSummary(questions=questions, chance=None, measures=measures)
    if not summaries:
        raise ConfigError(f"{task}: no measure with one number a question; give a task with acc or exact_match")
    return summaries


def _values(samples: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Measure -> its value of every question; a measure with several filters once for each."""
    values: dict[str, list[float]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            if isinstance(sample[metric], bool | int | float):
                name = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
                values.setdefault(name, []).append(float(sample[metric]))
    return values
