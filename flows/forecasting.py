"""What the result's divergence will be, said before its codes are refined.

The plan's candidates are in the store as soon as there is a plan. They are measured on some of the windows that the
result will be measured on, and refinement leaves a share of their divergence that is known (`lrpq.allocate.forecast`).
The plan's costs are no forecast: errors of layers meet, and a divergence on one text is none of that on another.
"""

from __future__ import annotations

from typing import Any

from flows.calibrate import HeldOut, StoredWindows
from flows.closing import forecast_line
from flows.guard import Contender
from flows.run import Run
from flows.scoring import ScoredWindows, score_stored
from lrpq.allocate.forecast import REFINED, every, refined_kl
from tasks.candidates import CandidatesJob
from tasks.cluster import Pool
from tasks.streams import StreamJob

STAGE = "forecast"
CANDIDATES = "candidates"


def forecast(
    run: Run,
    pool: Pool,
    stream: StreamJob,
    windows: ScoredWindows,
    candidates: Contender,
    *,
    head: CandidatesJob | None,
    text: str,
) -> dict[str, Any]:
    """Measure a plan's candidates and say what is to be expected of its refined codes; for the manifest.

    Args:
        run: the run.
        pool: its workers.
        stream: the model.
        windows: of the text that the result is measured on.
        candidates: the plan's.
        head: where the head's codes are, if it is quantized.
        text: what the windows are of.
    """
    contenders = {CANDIDATES: candidates}
    scores = score_stored(run, pool, stream, windows, contenders, head=head, stage=STAGE, label=STAGE)[CANDIDATES]
    found = {
        "source": text,
        "windows": windows.number,
        "length": windows.length,
        "candidates": scores,
        "factor": REFINED,
        "kl_nats": refined_kl(scores["kl_nats"]),
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
    return ScoredWindows(stored=stored, length=length, every=every(stored.num_windows)), source
