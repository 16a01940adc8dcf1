"""Work and peak memory of every stage, on the worker that has the most to do."""

from __future__ import annotations

from typing import TypeVar

from tasks.estimate.asked import Asked
from tasks.estimate.common import Common
from tasks.estimate.finishing import Finishing
from tasks.estimate.load import Load
from tasks.estimate.model import ModelShape
from tasks.estimate.profiling import Profiling
from tasks.estimate.refining import Refining
from tasks.estimate.rounding import Rounding

StageT = TypeVar("StageT", bound=Common)


def loads(shape: ModelShape, asked: Asked, *, num_workers: int, cpu: bool, kept_bytes: int) -> dict[str, Load]:
    """Stage -> load, in the order in which they run; arguments as of `Common`."""

    def of(stage: type[StageT]) -> StageT:
        return stage(shape, asked, num_workers=num_workers, cpu=cpu, kept_bytes=kept_bytes)

    found = {"profile": of(Profiling).profile(), "candidates": of(Rounding).candidates()}
    if asked.cost_rows is not None and not asked.sequential:
        found["stitch"] = of(Rounding).stitch(trellis=asked.trellis)
    if asked.forecast_windows:
        found["forecast"] = of(Finishing).score(
            asked.forecast_windows, asked.forecast_length, variants=1, held_out=not asked.evaluated_windows
        )
    if asked.sequential:
        found["refine"] = of(Refining).refine(
            corrected=asked.corrected,
            polish_rounds=asked.polish_rounds,
            weighted=asked.weighs_tokens,
            trellis=asked.trellis,
        )
    if asked.held_out_windows:
        if asked.cost_rows is not None:
            found["uniform"] = of(Rounding).stitch(trellis=False)
        found["guard"] = of(Finishing).score(asked.held_out_windows, asked.length, variants=2, held_out=True)
    found["assemble"] = of(Finishing).assemble()
    if asked.evaluated_windows:
        if asked.control:
            found["control"] = of(Refining).refine(corrected=False, polish_rounds=0, weighted=False, trellis=False)
        variants = 2 if asked.control else 1
        found["evaluate"] = of(Finishing).score(
            asked.evaluated_windows, asked.evaluated_length, variants, held_out=False
        )
    return found
