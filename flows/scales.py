"""What a run's scales are stored as, where that is left to the model."""

from __future__ import annotations

import torch

from flows.run_config import RunConfig
from flows.sections import AUTO, PER_CHANNEL, SCALE_BITS
from lrpq.errors import ModelError
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.streaming import BlockStream
from lrpq.transform.exponents import check_exact


def stored_scale_bits(config: RunConfig, source: ModelSource) -> int:
    """Bits of a group's scale, 8 or 16; reads no weights.

    Args:
        config: of the run. ``auto`` is float8 for language models that can be scaled by powers of two without a
            rounding, mixtures of experts left out: packed experts do not load with it.
        source: the original.

    Raises:
        ModelError: float8 is asked for, and the model cannot be scaled; it says why.
    """
    asked = config.candidates.scales
    if asked != AUTO:
        if SCALE_BITS[asked] == 8:
            check_exact(source)
        return SCALE_BITS[asked]
    if config.images.source is not None or config.candidates.group_sizes == (PER_CHANNEL,):
        return 16
    try:
        check_exact(source)
    except ModelError:
        return 16
    experts = any(spec.routed for spec in BlockStream(source, dtype=torch.float32).specs)
    return 16 if experts else 8
