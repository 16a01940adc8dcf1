"""How much of the evaluation text was calibrated on: such a measurement flatters the quantized model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tasks.calibration.windows import Windows

if TYPE_CHECKING:
    from jaxtyping import Int64, UInt64

NGRAM_TOKENS = 32  # about two sentences: longer than stock phrases
SHARED_NGRAMS = 0.1  # of a window: a system prompt or a licence line alone does not make it known text


def share_source(calibration: Windows, evaluation: Windows, *, ngram: int = NGRAM_TOKENS) -> float:
    """Share of the evaluation windows that were seen in calibration, in [0, 1].

    A window counts as seen when at least ``SHARED_NGRAMS`` of its runs of ``ngram`` tokens occur anywhere
    inside a calibration window. Runs are compared by a 64-bit hash; the first token of a window is left
    out, since it may be a BOS token. The run is shortened where windows are shorter than it.
    """
    ngram = min(ngram, calibration.length - 1, evaluation.length - 1)
    known = _hashes(calibration.tokens[:, 1:].numpy(), ngram)
    asked = _hashes(evaluation.tokens[:, 1:].numpy(), ngram)
    seen = np.isin(asked, known).mean(axis=1)
    return float((seen >= SHARED_NGRAMS).mean())


def overlap_warning(calibration: Windows, evaluation: Windows) -> str | None:
    """One line for the user when calibration and evaluation share their source or their text, else None."""
    share = share_source(calibration, evaluation)
    if calibration.source == evaluation.source or calibration.documents_digest == evaluation.documents_digest:
        return (
            f"calibration and evaluation read the same source ({evaluation.source}); {share:.0%} of the "
            "evaluation windows occur in calibration, so the figures flatter: evaluate on another text"
        )
    if share > 0:
        return (
            f"{share:.0%} of the evaluation windows ({evaluation.source}) occur in the calibration text "
            f"({calibration.source}), so the figures flatter: evaluate on another text"
        )
    return None


def _hashes(rows: Int64[np.ndarray, "n length"], ngram: int) -> UInt64[np.ndarray, "n num_ngrams"]:
    """Polynomial hash modulo 2^64 of every run of ``ngram`` tokens inside a row."""
    # splitmix64 (Steele et al. 2014) first: raw ids are small and would make short polynomials collide
    mixed = rows.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    count = rows.shape[1] - ngram + 1
    hashes = np.zeros((rows.shape[0], count), dtype=np.uint64)
    for offset in range(ngram):
        hashes = hashes * np.uint64(0xD1342543DE82EF95) + mixed[:, offset : offset + count]
    return hashes
