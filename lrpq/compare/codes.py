"""Codes of a whole model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from lrpq.allocate.plan import Plan
from lrpq.model.streaming import BlockStream
from lrpq.quant.grid import QuantizedWeight

Codes = dict[str, QuantizedWeight]


def on_host(q: QuantizedWeight) -> QuantizedWeight:
    """The same in host memory."""
    return QuantizedWeight(codes=q.codes.cpu(), scales=q.scales.cpu(), choice=q.choice)


def stitched(candidates: Mapping[str, Sequence[QuantizedWeight]], plan: Plan) -> Codes:
    """The candidates that a plan chose."""
    return {
        name: next(q for q in candidates[name] if q.choice == choice)
        for name, choice in plan.choices.items()
        if choice is not None
    }


class DenseCodes(Mapping[int, Mapping[str, Tensor]]):
    """Block -> module -> dense weight, made when a block is asked for.

    Args:
        stream: the model.
        codes: by module name.
    """

    def __init__(self, stream: BlockStream, codes: Mapping[str, QuantizedWeight]) -> None:
        self._stream, self._codes = stream, codes

    def __getitem__(self, block: int) -> Mapping[str, Tensor]:
        """Weights of one block, in the model's dtype; modules without codes are not named."""
        names = [spec.name for spec in self._stream.block_specs(block) if spec.name in self._codes]
        return {name: self._codes[name].dequantize(self._stream.dtype) for name in names}

    def __iter__(self) -> Iterator[int]:
        """All blocks."""
        return iter(range(self._stream.num_blocks))

    def __len__(self) -> int:
        """Number of blocks."""
        return self._stream.num_blocks
