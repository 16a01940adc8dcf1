"""What every block of a model is called with, found by running the model's own forward without its blocks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.models.swin import modeling_swin as swin

CACHES = frozenset({"past_key_values", "layer_past"})


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCall:
    """What one block is called with for one shape of batch."""

    arguments: dict[str, Any]
    """Keyword arguments besides the hidden states."""
    length: int
    """Tokens that it reads of a window."""


class Recorded(Exception):  # control flow, not an error
    """Raised by the last recorder: the rest of the forward is not needed. ``hidden`` is the first block's input."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def _with_pattern(block: nn.Module, hidden: Tensor, arguments: Mapping[str, Any]) -> Any:
    return hidden, None


def _merged(block: swin.SwinPatchMerging, hidden: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    height, width = arguments["input_dimensions"]
    return hidden.new_zeros(len(hidden), -(-height // 2) * -(-width // 2), block.reduction.out_features)


STAND_INS: Mapping[type[nn.Module], Callable[[Any, Tensor, Mapping[str, Any]], Any]] = {
    swin.SwinLayer: _with_pattern,
    swin.SwinPatchMerging: _merged,
}
"""Of blocks whose output is not a tensor of the shape of their input: what stands for it while arguments are recorded.
Others pass their input on."""


@contextmanager
def recording(blocks: Sequence[nn.Module], recorded: list[BlockCall]) -> Iterator[None]:
    """Replace every block's forward by one that records its keyword arguments and passes its input on."""
    first: list[Tensor] = []

    def recorder(block: nn.Module, names: Sequence[str], last: bool) -> Any:
        stand_in = STAND_INS.get(type(block))

        def forward(hidden: Tensor, *positional: Any, **named: Any) -> Any:
            first.append(hidden)
            arguments = {**dict(zip(names, positional, strict=False)), **named}
            arguments = {name: value for name, value in arguments.items() if name not in CACHES}
            recorded.append(BlockCall(arguments=arguments, length=hidden.shape[1]))
            if last:
                raise Recorded(first[0])
            return hidden if stand_in is None else stand_in(block, hidden, arguments)

        return forward

    for index, block in enumerate(blocks):
        names = list(inspect.signature(block.forward).parameters)[1:]
        block.forward = recorder(block, names, index == len(blocks) - 1)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
