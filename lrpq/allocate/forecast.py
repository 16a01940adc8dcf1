"""What refinement leaves of the divergence of a plan's candidates.

Candidates are GPTQ codes of each layer on the original inputs; refined codes are made layer by layer on the quantized
prefix. Of the divergence of the former on any text the latter leave much the same share whatever the model and the
budget, so that the one can be forecast from the other. Measured by ``python -m benchmarks.forecast`` (docs/log.md,
2026-11-28); the share is fitted on SmolLM2 alone, geometric mean of five budgets and two seeds.
"""

from __future__ import annotations

REFINED = 0.66
"""Share that refinement leaves. SmolLM2: .55 to .78 from 2.75 to 6.25 bits; Gemma 3 270M and Qwen2.5-Coder-0.5B: .53
to .88."""
MOST_WINDOWS = 16
"""That a forecast is measured on: it is good to tens of percent, which so many windows tell."""


def refined_kl(candidates_kl: float) -> float:
    """Forecast of the refined codes' divergence from that of the plan's candidates on the same text, nats a token."""
    return REFINED * candidates_kl


def every(num_windows: int) -> int:
    """Of how many windows one is measured."""
    return -(-num_windows // MOST_WINDOWS)
