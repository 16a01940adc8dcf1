"""Divergence of codes that lie in the store, on windows that nothing was calibrated on; kept in the store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from flows.calibrate import HeldOut, StoredWindows
from flows.guard import Contender
from flows.result import choices_json
from flows.run import Run
from flows.stages import run_scores
from tasks import evaluate
from tasks.candidates import CandidatesJob
from tasks.cluster import Pool
from tasks.evaluate import EvaluateJob, StoredCodes
from tasks.streams import StreamJob


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredWindows:
    """What is scored on."""

    stored: HeldOut | StoredWindows
    length: int
    """Tokens of a window."""
    stride: int = 1
    """The first of every so many is scored."""

    @property
    def number(self) -> int:
        """Of the windows that are scored."""
        return len(range(0, self.stored.num_windows, self.stride))


def scoring_stream(stream: StreamJob, windows: HeldOut | StoredWindows, *, length: int) -> StreamJob:
    """The model on other windows, one a shard: scores do not depend on which of them a worker holds."""
    return replace(
        stream,
        windows=windows.key,
        length=length,
        num_tokens=windows.num_windows * length,
        num_shards=windows.num_windows,
        micro_batch=1,
    )


def score_stored(
    run: Run,
    pool: Pool,
    stream: StreamJob,
    windows: ScoredWindows,
    contenders: Mapping[str, Contender],
    *,
    head: CandidatesJob | None,
    stage: str,
    label: str,
) -> Mapping[str, dict[str, Any]]:
    """Perplexity and KL divergence of codes in the store, by name.

    Args:
        run: the run.
        pool: its workers.
        stream: the model.
        windows: what is scored on.
        contenders: name -> codes.
        head: where the head's codes are, if it is quantized.
        stage: what the scores are of, in the store.
        label: what it is called while it runs.
    """
    parameters: dict[str, Any] = {name: choices_json(contender.plan.choices) for name, contender in contenders.items()}
    if windows.stride > 1:
        parameters["stride"] = windows.stride
    codes = {name: contender.key for name, contender in contenders.items()}
    folder = run.folder(
        stage, inputs={"windows": windows.stored.digest, **codes}, parameters=parameters, code=["tasks.evaluate"]
    )
    done = run.stored(folder, label)
    if done is None:
        job = EvaluateJob(
            stream=scoring_stream(stream, windows.stored, length=windows.length),
            variants={
                name: StoredCodes(folder=contender.codes, choices=contender.plan.choices, head=head)
                for name, contender in contenders.items()
            },
            stride=windows.stride,
        )
        scores = run_scores(run, pool, job, label)
        summaries = {name: asdict(evaluate.summarize(scores[name])) for name in contenders}
        done = run.finish(folder, label, {"scores": summaries})
    found: Mapping[str, dict[str, Any]] = done["scores"]
    return found
