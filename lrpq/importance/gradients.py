"""Costs from gradients of the text's own loss and the change that plain rounding makes."""

from __future__ import annotations

import torch

from lrpq.errors import QuantizationError
from lrpq.importance.evidence import ModuleEvidence


def gradient_times_change(evidence: ModuleEvidence) -> list[float]:
    """AutoScheme of AutoRound: sum |dL/dW o dW|, dW of plain rounding; nats per token.

    The gradient is the mean over tokens for the text's own labels: with sampled labels its expectation is zero.
    """
    if evidence.gradient is None:
        raise QuantizationError(f"{evidence.spec.name}: no gradient of its weights was gathered")
    found = []
    for q in evidence.rounded:
        change = evidence.W - q.dequantize(evidence.W.dtype)
        found.append(float((evidence.gradient * change).abs().sum(dtype=torch.float64)))
    return found


def gradient_times_output_error(evidence: ModuleEvidence) -> list[float]:
    """ModelOpt's gradient score: mean over tokens of sum_j g_tj^2 dy_tj^2, dy of plain rounding; nats."""
    if evidence.output_error is None:
        raise QuantizationError(f"{evidence.spec.name}: no output error was gathered")
    return list(evidence.output_error)
