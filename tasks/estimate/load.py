"""What a stage has to do, and what it needs at its worst moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lrpq.plan.work import NOTHING, Work


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One stage."""

    work: Work = NOTHING
    """Of all workers."""
    busiest: Work = NOTHING
    """Of the worker that has most; what the stage waits for."""
    tensors: Mapping[str, float] = field(default_factory=dict)
    """Bytes alive at the worst moment, by what they are; on the device where there is one."""
    host: Mapping[str, float] = field(default_factory=dict)
    """Bytes in host memory beside those, per worker."""
    spilled_bytes: float = 0.0
    """Kept inputs that do not fit into memory, per worker."""
    network_bytes: float = 0.0
    """Between workers, all together."""
    fixed_seconds: float = 0.0
    """Time that no size changes."""
    steps: int = 0
    """Calls that one waits for: task runs of Prefect, each with a call on every worker."""
