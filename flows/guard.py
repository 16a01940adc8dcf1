"""The guarantee: on held-out calibration windows the result is no worse than the uniform candidate under its budget.

Otherwise the uniform candidate is what the user gets, and is told so. The comparison is made on windows that nothing
was calibrated on, before anything is written.

A window of text has hundreds of predictions, an image one, and of a model that is sure of its training images a few
hold nearly all of the divergence. So a result on images counts as worse where it is by more than `ERRORS` standard
errors of the paired difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from flows.calibrate import HeldOut
from flows.run import Run
from lrpq.allocate.plan import Plan
from tasks.artifacts import StageFolder
from tasks.candidates import CandidatesJob

STAGE = "guard"
OURS, UNIFORM = "lrpq", "uniform"
ERRORS = 2.0
"""Where k of n images hold all of a difference, in equal parts, it is some sqrt(k) of its standard errors: what one or
two images say is chance, and five are heard."""
DIFFERENCE_ERROR = "difference_standard_error"
"""Of images, in the result's scores: standard error of its paired difference to the uniform candidate, nats an image;
None with one image."""


class Windows(Enum):
    """What a window is, in words."""

    TEXT = "windows"
    IMAGES = "images"

    @property
    def windows(self) -> str:
        """Several."""
        return self.value

    @property
    def source(self) -> str:
        """Where they come from."""
        return "text" if self is Windows.TEXT else "images"

    @property
    def unit(self) -> str:
        """What a divergence is a mean over."""
        return "a token" if self is Windows.TEXT else "an image"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """Codes in the store under a plan."""

    codes: StageFolder | CandidatesJob
    plan: Plan

    @property
    def key(self) -> str:
        """Key of the stage that made the codes."""
        return self.codes.key if isinstance(self.codes, StageFolder) else self.codes.folder.key


Measure = Callable[[Mapping[str, Contender]], Mapping[str, dict[str, Any]]]
"""Scores of contenders, by name."""


def guarded(
    run: Run,
    held_out: HeldOut | None,
    ours: Contender,
    uniform: Contender | None,
    *,
    measure: Measure,
    wanted: bool,
    of: Windows = Windows.TEXT,
) -> tuple[dict[str, Any], Contender]:
    """What was measured (empty where nothing could be compared: why is a warning), and which of the two is written.

    Args:
        run: the run.
        held_out: windows to measure on.
        ours: the result.
        uniform: the uniform candidate under the same budget.
        measure: measures contenders on these windows.
        wanted: whether to compare at all.
        of: what a window is.
    """
    if not wanted:
        return {}, ours
    if held_out is None:
        run.warn(f"the result is not guarded: no {of.windows} of the calibration {of.source} were held out")
        return {}, ours
    if uniform is None:
        run.warn("the result is not guarded: no uniform plan is possible under this budget")
        return {}, ours
    scores = measure({OURS: ours, UNIFORM: uniform})
    kept = better(scores, of)
    choice = next(str(c) for c in uniform.plan.choices.values() if c is not None)
    found = {"windows": held_out.num_windows, "uniform_choice": choice, "kept": kept, **scores}
    if of is Windows.IMAGES:
        found["of"] = of.value
    if kept == OURS:
        return found, ours
    run.warn(
        f"on {held_out.num_windows} held-out {of.windows} lrpq's plan has a KL of {scores[OURS]['kl_nats']:.4f} nats "
        f"{of.unit} and uniform {choice} one of {scores[UNIFORM]['kl_nats']:.4f}: uniform is what is written"
    )
    return found, uniform


def better(scores: Mapping[str, Mapping[str, Any]], of: Windows) -> str:
    """Which of the two is kept: ours, unless it is worse."""
    margin = ERRORS * (scores[OURS][DIFFERENCE_ERROR] or 0.0) if of is Windows.IMAGES else 0.0
    return OURS if scores[OURS]["kl_nats"] <= scores[UNIFORM]["kl_nats"] + margin else UNIFORM
