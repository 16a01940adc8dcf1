"""Rates of trellis codes, for GPUs on which they were not measured."""

from __future__ import annotations

from dataclasses import replace

from lrpq.errors import ConfigError
from lrpq.plan.machine import Machine
from lrpq.plan.trellis import SEGMENTS_AT_ONCE, STEPS

TRELLIS_RATES = {
    f"{STEPS}:{bits}": 1e6 / microseconds
    for bits, microseconds in {2: 0.33, 3: 0.31, 4: 0.29, 5: 0.30, 6: 0.39}.items()
}
"""Of 264 segments at once on an H200 (docs/log.md, 2026-11-29)."""
TRELLIS_ASSUMED = (
    f"trellis codes: .29 to .39 us for a row of the segments of a column, up to {SEGMENTS_AT_ONCE} segments at once, as"
    " on an H200 (docs/log.md, 2026-11-29); not measured on this GPU"
)


def with_trellis_rates(machine: Machine) -> Machine:
    """The machine, a GPU that knows no rates of trellis codes with those of another.

    Raises:
        ConfigError: a machine without GPUs that was measured before there were such codes.
    """
    missing = {kind: rate for kind, rate in TRELLIS_RATES.items() if kind not in machine.rates}
    if not missing:
        return machine
    if machine.device != "cuda":
        raise ConfigError(
            f"machine {machine.name}: it was measured before there were trellis codes and has no rates of them; measure"
            " again with lrpq plan --calibrate"
        )
    return replace(machine, rates={**missing, **machine.rates}, assumed=(*machine.assumed, TRELLIS_ASSUMED))
