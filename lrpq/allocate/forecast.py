"""What refinement leaves of the divergence of a plan's candidates.

Candidates are GPTQ codes of each layer on the original inputs; refined codes are made layer by layer on the quantized
prefix. Of the divergence of the former the latter leave a share that is known to tens of percent, so that the one can
be forecast from the other, on the same text. Measured by ``python -m benchmarks.forecast`` with the default refinement
on dense language models (docs/log.md, 2026-11-28, second entry): .53 to .88, more where the budget is larger. The share
that is used is fitted on SmolLM2 alone.
"""

from __future__ import annotations

REFINED = 0.66
"""Share that refinement leaves of SmolLM2's divergence, geometric mean of 2.75, 3.25, 4.25, 5.25 and 6.25 bits and two
seeds; .55 to .78."""
SPREAD = (0.80, 1.28)
"""What was measured over what was forecast: lowest and highest of SmolLM2, Gemma 3 270M and Qwen2.5-Coder-0.5B."""
MOST_WINDOWS = 16
"""That a forecast is measured on: it is good to tens of percent, which so many windows tell."""


def refined_kl(candidates_kl: float) -> float:
    """Forecast of the refined codes' divergence from that of the plan's candidates on the same text, nats a token."""
    return REFINED * candidates_kl


def stride_of(num_windows: int) -> int:
    """Every so manieth window is measured, the first of them first."""
    return -(-num_windows // MOST_WINDOWS)


def measured_windows(num_windows: int) -> int:
    """How many of so many windows are measured."""
    return len(range(0, num_windows, stride_of(num_windows))) if num_windows else 0
