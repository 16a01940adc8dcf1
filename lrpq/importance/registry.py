"""Measures of importance under their standard names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lrpq.importance import curvature, gradients, rankings
from lrpq.importance.evidence import Costs, Score
from lrpq.relevance.rules import Pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """A measure of importance and what it needs to be gathered."""

    source: str
    costs: Costs | None = None
    """Cost of every choice, for the exact allocation."""
    score: Score | None = None
    """Or a ranking, for two levels of bits."""
    passes: frozenset[Pass] = frozenset()
    """Backward passes besides the Fisher's."""
    weighting: str | None = None
    """Token weighting whose Hessian it reads."""
    rounded: bool = False
    """Whether it looks at plain rounding."""
    text_labels: bool = False
    """Whether it needs gradients of the text's own loss: a sweep more."""


MEASURES: Mapping[str, Measure] = {
    "lrpq": Measure(
        source="Fisher curvature, H of the run's blended token weights (docs/methods.md, section 1)",
        costs=curvature.pipeline("blend"),
        passes=frozenset({Pass.LRP}),
        weighting="blend",
    ),
    "sampled": Measure(
        source="as lrpq, from a few rows of every layer (`compress --cost-rows`)",
        costs=curvature.sampled("blend"),
        passes=frozenset({Pass.LRP}),
        weighting="blend",
    ),
    "fisher": Measure(
        source="Fisher curvature, Fisher-weighted Hessian (GuidedQuant, arXiv:2505.07004)",
        costs=curvature.fisher,
        weighting="fisher",
    ),
    "lrp": Measure(
        source="AttnLRP curvature (Achtibat et al. 2024, arXiv:2402.05602)",
        costs=curvature.lrp,
        passes=frozenset({Pass.LRP}),
        weighting="lrp",
    ),
    "cp-lrp": Measure(
        source="CP-LRP curvature (Ali et al. 2022, arXiv:2202.07304)",
        costs=curvature.cp_lrp,
        passes=frozenset({Pass.CP_LRP}),
        weighting="cp-lrp",
    ),
    "blend": Measure(
        source="geometric mean of Fisher and AttnLRP",
        costs=curvature.blend,
        passes=frozenset({Pass.LRP}),
        weighting="blend",
    ),
    "hessian-trace": Measure(source="HAWQ-V2 (arXiv:1911.03852)", costs=curvature.hessian_trace, rounded=True),
    "gradient-change": Measure(
        source="AutoScheme (AutoRound): sum |grad dW|",
        costs=gradients.gradient_times_change,
        rounded=True,
        text_labels=True,
    ),
    "gradient-output": Measure(
        source="ModelOpt: grad^2 dout^2",
        costs=gradients.gradient_times_output_error,
        rounded=True,
        text_labels=True,
    ),
    "relevance-magnitude": Measure(
        source="LRP-QViT (arXiv:2401.11243)",
        score=rankings.relevance_magnitude,
        passes=frozenset({Pass.LRP}),
    ),
    "lim": Measure(
        source="Layer-Wise Quantization: LIM (arXiv:2406.17415)",
        score=rankings.layer_input_modification,
    ),
    "zd": Measure(source="Layer-Wise Quantization: ZD (arXiv:2406.17415)", score=rankings.z_score_distribution),
}
"""Measures that are formulas over the evidence. BAQ's rule and the measured costs depend on the budget or on the model:
see ``compare/prepared.py``."""
