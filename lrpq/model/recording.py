"""What every block of a model is called with, found by running the model's own forward without its blocks."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

CACHES = frozenset({"past_key_values", "layer_past"})


class Recorded(Exception):  # control flow, not an error
    """Raised by the last recorder: the rest of the forward is not needed. ``hidden`` is the first block's input."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


@contextmanager
def recording(blocks: nn.ModuleList, recorded: list[dict[str, Any]]) -> Iterator[None]:
    """Replace every block's forward by one that records its keyword arguments and passes its input on."""

    def recorder(names: Sequence[str], last: bool) -> Any:
        def forward(hidden: Tensor, *positional: Any, **named: Any) -> Tensor:
            arguments = {**dict(zip(names, positional, strict=False)), **named}
            recorded.append({name: value for name, value in arguments.items() if name not in CACHES})
            if last:
                raise Recorded(hidden)
            return hidden

        return forward

    for index, block in enumerate(blocks):
        names = list(inspect.signature(block.forward).parameters)[1:]
        block.forward = recorder(names, index == len(blocks) - 1)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
