"""Costs from gradients of the text's own loss and the change that plain rounding makes."""

from __future__ import annotations

from lrpq.errors import QuantizationError
from lrpq.importance.evidence import ModuleEvidence


def gradient_times_change(evidence: ModuleEvidence) -> list[float]:
    """AutoScheme of AutoRound: sum |dL/dW o dW|, dW of plain rounding; nats per token.

    The gradient is the mean over tokens for the text's own labels: with sampled labels its expectation is zero.
    """
    if evidence.gradient_change is None:
        raise QuantizationError(f"{evidence.spec.name}: no gradient of its weights was gathered")
    return list(evidence.gradient_change)


def gradient_times_output_error(evidence: ModuleEvidence) -> list[float]:
    """ModelOpt's gradient score: mean over tokens of sum_j g_tj^2 dy_tj^2, dy of plain rounding; nats."""
    if evidence.output_error is None:
        raise QuantizationError(f"{evidence.spec.name}: no output error was gathered")
    return list(evidence.output_error)
