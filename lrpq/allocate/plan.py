"""What an allocation decides, what it takes and how far it is from the best possible."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from lrpq.model.layers import Choice


class Method(enum.Enum):
    """How a plan was made."""

    EXACT = "exact"
    LAGRANGIAN = "lagrangian"
    UNIFORM = "uniform"
    TWO_LEVEL = "two-level"
    SEARCHED = "searched"
    """By measurements of whole plans."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A choice for every module, what it takes and how far it is from the best possible."""

    method: Method
    choices: Mapping[str, Choice | None]
    """Module name -> choice; None is 16 bits. Modules outside the allocation are included."""
    storage_bits: int
    """Of the modules in the allocation."""
    num_weights: int
    """Of the modules in the allocation."""
    capacity_bits: int
    cost_nats: float
    bound_nats: float
    """No plan with ``bound_bits`` costs less than this."""
    bound_bits: int
    """Capacity that ``bound_nats`` is for: the problem's, or for a baseline the plan's own storage."""
    binding: bool
    """Whether more capacity could lower the cost; if not, every group has its best option."""
    num_dominated: int
    """Options left out because another is no larger and no dearer."""
    left_at_16: Mapping[str, str] = field(default_factory=dict)
    """Modules outside the allocation -> why."""
    left_bits: int = 0
    """Storage of the modules outside the allocation."""
    stopped_early: bool = False
    """The solver met its time limit before its gap."""

    @property
    def average_bits(self) -> float:
        """All-in bits per weight over the modules in the allocation."""
        return self.storage_bits / self.num_weights

    @property
    def gap(self) -> float:
        """(cost - bound) / cost: at most this share of the cost could be saved; 0 is proved optimal."""
        return (self.cost_nats - self.bound_nats) / self.cost_nats if self.cost_nats > 0 else 0.0

    @property
    def names_at_16(self) -> tuple[str, ...]:
        """Every module that stays at 16 bits, left out or chosen."""
        return tuple(name for name, choice in self.choices.items() if choice is None)
