"""Scores that only rank: they say which layer comes first, not what a bit is worth."""

from __future__ import annotations

from lrpq.errors import QuantizationError
from lrpq.importance.evidence import ModuleEvidence

Z_SCORE = 1.0  # Layer-Wise Quantization's threshold


def relevance_magnitude(evidence: ModuleEvidence) -> float:
    """LRP-QViT (Ranjan and Savakis 2024, arXiv:2401.11243): the relevance that passes through a layer.

    mean over tokens of sum_j |R_tj|, with R the output times AttnLRP's gradient at it.
    """
    return evidence.relevance


def layer_input_modification(evidence: ModuleEvidence) -> float:
    """LIM (Layer-Wise Quantization, Dumitru et al. 2024, arXiv:2406.17415): -cos(block input, block output).

    One score for all modules of a block.

    Raises:
        QuantizationError: the block merges tokens, so that its outputs cannot be compared with its inputs.
    """
    if evidence.block_cosine is None:
        raise QuantizationError(
            f"{evidence.spec.name}: the measure lim compares a block's outputs with its inputs, and this block merges "
            "tokens; choose another measure"
        )
    return -evidence.block_cosine


def z_score_distribution(evidence: ModuleEvidence) -> float:
    """ZD (same source): share of weights whose z-score is above 1; the smaller it is the more a layer matters."""
    W = evidence.W
    z = (W - W.mean()) / W.std().clamp_min(1e-30)
    return -float((z > Z_SCORE).double().mean())
