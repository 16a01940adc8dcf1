"""What the result's divergence will be, said before its codes are refined.

The plan's candidates are in the store as soon as there is a plan. They are measured on some of the windows that the
result will be measured on, and what refinement leaves of their divergence is known to tens of percent
(`lrpq.allocate.forecast`). The plan's costs are no forecast: errors of layers meet, and a divergence on one text is
none of that on another.
"""

from __future__ import annotations

from typing import Any

from flows.calibrate import HeldOut, StoredWindows
from flows.closing import forecast_line
from flows.config import CompressConfig
from flows.guard import Contender
from flows.run import Run
from flows.scoring import ScoredWindows, score_stored
from lrpq.allocate.forecast import REFINED, SPREAD, refined_kl, stride_of
from lrpq.errors import CheckpointError
from tasks.cluster import Pool
from tasks.streams import StreamJob

STAGE = "forecast"
CANDIDATES = "candidates"


def can_forecast(config: CompressConfig) -> bool:
    """Whether a forecast is wanted and its share was measured for what is asked for: candidates that are all in the
    store, and a refinement with all of its parts that leaves their kind of codes. A quantized head is not refined, and
    images have other shares."""
    run, plan = config.run, config.plan
    refined = plan.refine == "sequential" and plan.correction > 0 and plan.polish > 0 and plan.row_blocks > 1
    refined = refined and plan.codes == "uniform"
    gathered = run.gradients_every == 1 and run.candidates.cost_rows is None
    of_text = run.images.source is None and run.candidates.quantize_head is None
    return config.evaluation.forecast and refined and gathered and of_text


def forecast(
    run: Run, pool: Pool, stream: StreamJob, windows: ScoredWindows, candidates: Contender, *, text: str
) -> dict[str, Any] | None:
    """Measure a plan's candidates and say what is to be expected of its refined codes; for the manifest. None, with a
    warning, where the candidates' logits are not finite: refined codes need not be so.

    Args:
        run: the run.
        pool: its workers.
        stream: the model.
        windows: of the text that the result is measured on.
        candidates: the plan's.
        text: what the windows are of.
    """
    contenders = {CANDIDATES: candidates}
    try:
        scores = score_stored(run, pool, stream, windows, contenders, head=None, stage=STAGE, label=STAGE)[CANDIDATES]
    except CheckpointError as error:
        run.warn(f"no forecast: {error}")
        return None
    kl = refined_kl(scores["kl_nats"])
    found = {
        "source": text,
        "windows": windows.number,
        "length": windows.length,
        "candidates": scores,
        "factor": REFINED,
        "kl_nats": kl,
        "range_nats": [share * kl for share in SPREAD],
    }
    run.progress.tell(forecast_line(found))
    return found


def forecast_windows(
    measured: StoredWindows | None, calibration: StoredWindows, *, measured_length: int, length: int
) -> tuple[ScoredWindows, str] | None:
    """Windows to forecast on and what they are of: those that will be measured, else those held out; None without."""
    stored: StoredWindows | HeldOut
    if measured is not None:
        stored, source, length = measured, measured.source, measured_length
    elif calibration.held_out is not None:
        stored, source = calibration.held_out, f"{calibration.source}, held out"
    else:
        return None
    return ScoredWindows(stored=stored, length=length, stride=stride_of(stored.num_windows)), source
