"""What a walk back through a model is asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from lrpq.importance.registry import Measure
from lrpq.importance.weightings import ATTENTION, INVERSE_NORM
from lrpq.relevance.rules import Pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Of one walk; attention weights take another one."""

    weightings: frozenset[str]
    """Token weightings to find."""
    hessians_by: frozenset[str]
    """Those of them whose Hessians are summed."""
    passes: frozenset[Pass]
    """Backward passes besides those that the weightings need."""
    with_outputs: bool
    """Second moments of the gradients at outputs too."""

    def within(self, other: Asked) -> bool:
        """Whether a walk for ``other`` finds all that this asks for."""
        return (
            self.weightings <= other.weightings
            and self.hessians_by <= other.hessians_by
            and self.passes <= other.passes
            and self.with_outputs <= other.with_outputs
        )

    @property
    def at_outputs(self) -> Asked:
        """Without weightings that look at the inputs: what is left is the same however inputs are shifted and scaled,
        or follows exactly."""
        return replace(self, weightings=self.weightings - {INVERSE_NORM}, hessians_by=self.hessians_by - {INVERSE_NORM})


def asked_by(
    measures: Mapping[str, Measure], weightings: Iterable[str], *, candidates_by: str, with_outputs: bool
) -> Asked:
    """What some measures, and candidates by the Hessian of one weighting, need besides ``weightings``."""
    hessians: Collection[str] = {candidates_by, *(m.weighting for m in measures.values() if m.weighting is not None)}
    return Asked(
        weightings=frozenset({*weightings, *hessians} - {ATTENTION}),
        hessians_by=frozenset(hessians),
        passes=frozenset().union(*(measure.passes for measure in measures.values())),
        with_outputs=with_outputs,
    )
