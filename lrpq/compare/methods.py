"""The methods of a comparison under their standard names, with sources.

A method differs from lrpq's default, or from the control, in one thing: its axis says which.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, replace

from lrpq.compare.planned import COOPQ, REESTIMATED, SWAPS
from lrpq.compare.recipes import CONTROL, DEFAULT, FAST, STITCHED, Recipe, Rounding
from lrpq.errors import ConfigError
from lrpq.importance.registry import MEASURES


class Axis(enum.Enum):
    """What a method changes."""

    WHOLE = "whole method"
    ALLOCATION = "allocation of the bits"
    WEIGHTS = "token weights of the Hessian"
    TRANSFORM = "transform before quantizing"
    TUNING = "tuning on the divergence, after all codes are found"
    REMOVED = "lrpq without one ingredient"
    ADDED = "the control with one ingredient"


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One row of the table."""

    axis: Axis
    source: str
    recipe: Recipe


EQUAL_LOSS, ONE_AT_A_TIME, NOISE, DIRECTIONAL = "equal-loss", "measured", "noise-factors", "directional"
"""Allocations that need the budget or measurements."""

_WEIGHT_SOURCES: Mapping[str, str] = {
    "none": "plain GPTQ Hessian",
    "inverse-norm": "1/|x|^2, the gradient-free control",
    "attention": "RSQ (arXiv:2503.01820)",
    "fisher": "GuidedQuant, one group (arXiv:2505.07004)",
    "lrp": "AttnLRP (arXiv:2402.05602)",
    "cp-lrp": "CP-LRP (arXiv:2202.07304)",
}
_MEASURED_SOURCES: Mapping[str, str] = {
    EQUAL_LOSS: "BAQ's equal-loss rule, on modules",
    DIRECTIONAL: "this project: Fisher curvature along each candidate's own error, no product of means",
    ONE_AT_A_TIME: "AdaQuant's integer program (arXiv:2006.10518): measured KL of single modules",
    NOISE: "HIGGS (arXiv:2411.17525): factors fitted by noise",
    COOPQ: "CoopQ (arXiv:2509.15455): Shapley values of blocks, progressively demoted, and their covariance",
    REESTIMATED: "a second plan from costs at the first plan's model (as PQI, arXiv:2503.01901)",
}


_TRANSFORM_SOURCES: Mapping[str, str] = {
    "hadamard": "QuaRot, residual stream (arXiv:2404.00456); a tied head is untied",
    "random-rotation": "random orthogonal, residual stream; a tied head is untied",
    "hadamard-values": "SpinQuant's R1 and R2, not learned (arXiv:2405.16406); a tied head is untied",
    "awq": "AWQ scaling, without clipping (arXiv:2306.00978)",
    "smoothquant+": "SmoothQuant+, one exponent for the model (arXiv:2312.03788)",
}


_TUNING_SOURCES: Mapping[str, str] = {
    "gains": "AdaQuant's norm tuning (arXiv:2006.10518), end to end",
    "scales": "EfficientQAT's second phase (arXiv:2407.11062)",
    "scales+gains": "both",
    "codes": "scales, gains and codes, straight through (as PV-Tuning's baseline, arXiv:2405.14852)",
}


def _methods() -> dict[str, Method]:
    found = {
        "lrpq": Method(axis=Axis.WHOLE, source="this project", recipe=DEFAULT),
        "control": Method(
            axis=Axis.WHOLE, source="uniform GPTQ (arXiv:2210.17323), sequential, activation order", recipe=CONTROL
        ),
        "fast": Method(
            axis=Axis.WHOLE,
            source="this project, `compress --fast`: Fisher costs from every 8th window and some rows, plain GPTQ",
            recipe=FAST,
        ),
        "stitched": Method(
            axis=Axis.WHOLE,
            source="this project, `compress --refine stitch`: lrpq's plan and its candidates, unrefined",
            recipe=STITCHED,
        ),
        "gptq-in-order": Method(
            axis=Axis.WHOLE,
            source="uniform GPTQ without activation order",
            recipe=replace(CONTROL, rounding=Rounding.GPTQ_IN_ORDER),
        ),
        "nearest": Method(
            axis=Axis.WHOLE, source="rounding to nearest", recipe=replace(CONTROL, rounding=Rounding.NEAREST)
        ),
    }
    for name, measure in MEASURES.items():
        if name != DEFAULT.allocation:
            recipe = replace(DEFAULT, allocation=name)
            found[f"allocation:{name}"] = Method(axis=Axis.ALLOCATION, source=measure.source, recipe=recipe)
    for name, source in _MEASURED_SOURCES.items():
        recipe = replace(DEFAULT, allocation=name)
        found[f"allocation:{name}"] = Method(axis=Axis.ALLOCATION, source=source, recipe=recipe)
    found[SWAPS] = Method(
        axis=Axis.ALLOCATION,
        source="measured swaps of bits between two layers, after lrpq's plan",
        recipe=replace(DEFAULT, allocation=SWAPS),
    )
    for name, source in _WEIGHT_SOURCES.items():
        recipe = replace(DEFAULT, weighting=name)
        found[f"weights:{name}"] = Method(axis=Axis.WEIGHTS, source=source, recipe=recipe)
    for name, source in _TRANSFORM_SOURCES.items():
        found[f"transform:{name}"] = Method(axis=Axis.TRANSFORM, source=source, recipe=replace(DEFAULT, transform=name))
        found[f"control+{name}"] = Method(axis=Axis.ADDED, source=source, recipe=replace(CONTROL, transform=name))
    for name, source in _TUNING_SOURCES.items():
        found[f"tuned:{name}"] = Method(axis=Axis.TUNING, source=source, recipe=replace(DEFAULT, tuning=name))
    removed = {
        "allocation": replace(DEFAULT, allocation="uniform", wide_scales=True),  # as many bits in all as the control
        "token-weights": replace(DEFAULT, weighting="none"),
        "correction": replace(DEFAULT, correction=0.0),
        "polish": replace(DEFAULT, polish_rounds=0),
        "row-feedback": replace(DEFAULT, row_blocks=1),
    }
    for name, recipe in removed.items():
        found[f"without:{name}"] = Method(axis=Axis.REMOVED, source="ablation", recipe=recipe)
    added = {
        "allocation": replace(CONTROL, allocation=DEFAULT.allocation),
        "token-weights": replace(CONTROL, weighting=DEFAULT.weighting),
        "correction": replace(CONTROL, correction=DEFAULT.correction),
        "polish": replace(CONTROL, polish_rounds=DEFAULT.polish_rounds),
        "row-feedback": replace(CONTROL, row_blocks=DEFAULT.row_blocks),
    }
    for name, recipe in added.items():
        found[f"control+{name}"] = Method(axis=Axis.ADDED, source="ablation", recipe=recipe)
    return found


METHODS: Mapping[str, Method] = _methods()
DEFAULT_METHODS: tuple[str, ...] = ("lrpq", "control", "gptq-in-order", "nearest")


def methods_named(names: list[str]) -> dict[str, Method]:
    """Look methods up; a name that ends in ``*`` stands for all that begin so.

    Raises:
        ConfigError: no such method.
    """
    found: dict[str, Method] = {}
    for name in names:
        if name.endswith("*"):
            matching = {known: m for known, m in METHODS.items() if known.startswith(name[:-1])}
        else:
            matching = {name: METHODS[name]} if name in METHODS else {}
        if not matching:
            raise ConfigError(f"method {name!r}: not known; `lrpq compare --list` shows all {len(METHODS)}")
        found |= matching
    return found
