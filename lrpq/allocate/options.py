"""What the allocation chooses from: measured costs of modules, summed over the groups that share a choice."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lrpq.errors import QuantizationError
from lrpq.model.layers import Choice, LinearSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class CostRow:
    """What one module costs under one choice."""

    module: LinearSpec
    choice: Choice | None
    """None: the module stays at 16 bits."""
    storage_bits: int
    """Bits in the checkpoint: codes, scales, zero points."""
    cost_nats: float
    """Predicted increase of the loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """What a whole fused group costs under one choice."""

    choice: Choice | None
    storage_bits: int
    cost_nats: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Modules that share one choice, and the choices they have."""

    name: str
    members: tuple[LinearSpec, ...]
    options: tuple[Option, ...]
    fixed: bool = False
    """It has one option, which no keep rule and no baseline changes."""

    @property
    def num_weights(self) -> int:
        """Weights of all members."""
        return sum(member.num_weights for member in self.members)

    def useful_options(self) -> tuple[Option, ...]:
        """Return the options that are not dominated: storage rises, cost strictly falls.

        An option is dominated by one that is no larger and no dearer. Leaving such options out never
        changes the least cost; it does mean that no bits are spent where more of them measured worse (noise
        in the costs).
        """
        useful: list[Option] = []
        for option in sorted(self.options, key=_order):
            if not useful or option.cost_nats < useful[-1].cost_nats:
                useful.append(option)
        return tuple(useful)


CostTable = Mapping[str, Mapping[Choice | None, CostRow]]


def index_rows(rows: Iterable[CostRow]) -> tuple[dict[str, LinearSpec], CostTable]:
    """Return the modules by name and their rows by choice, checked (QuantizationError names the module)."""
    modules: dict[str, LinearSpec] = {}
    table: dict[str, dict[Choice | None, CostRow]] = {}
    for row in rows:
        name = row.module.name
        if not math.isfinite(row.cost_nats) or row.cost_nats < 0:
            raise QuantizationError(
                f"{name}: cost of {_show(row.choice)} is {row.cost_nats}; expected a finite number, 0 or more"
            )
        if row.storage_bits <= 0:
            raise QuantizationError(f"{name}: storage of {_show(row.choice)} is {row.storage_bits} bits")
        if modules.setdefault(name, row.module) != row.module:
            raise QuantizationError(f"{name}: two modules have this name")
        if row.choice in table.setdefault(name, {}):
            raise QuantizationError(f"{name}: {_show(row.choice)} has two costs")
        table[name][row.choice] = row
    return modules, table


def shared_options(members: Sequence[LinearSpec], table: CostTable) -> list[Option]:
    """Return the options that all members have, summed; QuantizationError if none quantizes."""
    shared = set(table[members[0].name])
    for member in members[1:]:
        shared &= set(table[member.name])
    if not shared - {None}:
        names = ", ".join(member.name for member in members)
        raise QuantizationError(f"{names}: no candidate that all of them have; they are served as one layer")
    options = [
        Option(
            choice=choice,
            storage_bits=sum(table[member.name][choice].storage_bits for member in members),
            cost_nats=math.fsum(table[member.name][choice].cost_nats for member in members),
        )
        for choice in shared
    ]
    return sorted(options, key=_order)


def _order(option: Option) -> tuple[int, float, Choice]:
    """Storage, then cost, then choice: ties do not depend on the order of the rows."""
    return option.storage_bits, option.cost_nats, option.choice or Choice(bits=16, group_size=-1)


def _show(choice: Choice | None) -> str:
    return "16 bits" if choice is None else str(choice)
