"""Transforms of the whole model before it is quantized, under their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lrpq.compare.terms import Terms
from lrpq.model.layers import Choice
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.streaming import BlockStream
from lrpq.transform.awq import search_awq
from lrpq.transform.orthogonal import RotationKind
from lrpq.transform.rotation import RotationScope, rotate
from lrpq.transform.smoothing import smooth
from lrpq.transform.smoothquant import search_smoothquant

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

NONE = "none"
SEARCH_WINDOWS = 4
"""Calibration windows that scales are searched on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformInputs:
    """What a transform may look at."""

    source: ModelSource
    tokens: Int[Tensor, "windows length"]
    terms: Terms
    choice: Choice
    """What layers will be rounded to, near enough for a search."""

    def stream(self) -> BlockStream:
        """The model, opened for a search."""
        return BlockStream(self.source, dtype=self.terms.dtype, device=self.terms.device)


Transform = Callable[[TransformInputs, Path], None]
"""Writes the transformed model to a folder that does not exist yet."""


def _rotation(kind: RotationKind, scope: RotationScope) -> Transform:
    def write(inputs: TransformInputs, folder: Path) -> None:
        generator = torch.Generator("cpu").manual_seed(inputs.terms.seed)
        rotate(inputs.source, folder, generator=generator, kind=kind, scope=scope)

    return write


def _awq(inputs: TransformInputs, folder: Path) -> None:
    found = search_awq(inputs.stream(), inputs.tokens[:SEARCH_WINDOWS], inputs.choice, grid=inputs.terms.grid)
    smooth(inputs.source, folder, found.smoothing)


def _smoothquant(inputs: TransformInputs, folder: Path) -> None:
    found = search_smoothquant(inputs.stream(), inputs.tokens[:SEARCH_WINDOWS], inputs.choice, grid=inputs.terms.grid)
    smooth(inputs.source, folder, found.smoothing)


TRANSFORMS: Mapping[str, Transform] = {
    "hadamard": _rotation(RotationKind.HADAMARD, RotationScope.RESIDUAL),
    "random-rotation": _rotation(RotationKind.RANDOM, RotationScope.RESIDUAL),
    "hadamard-values": _rotation(RotationKind.HADAMARD, RotationScope.RESIDUAL_AND_VALUES),
    "awq": _awq,
    "smoothquant+": _smoothquant,
}
DEPENDS_ON_BITS = frozenset({"awq", "smoothquant+"})
