"""What a tuned model consists of, by block: as the evaluation takes it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lrpq.errors import QuantizationError
from lrpq.model.streaming import BlockStream
from lrpq.quant.grid import QuantizedWeight


def dense_weights(
    stream: BlockStream, weights: Mapping[str, QuantizedWeight], vectors: Mapping[str, Tensor]
) -> dict[int, dict[str, Tensor]]:
    """Block -> module -> dense weight; the number of blocks stands for what follows them.

    Args:
        stream: the original model.
        weights: codes by module name.
        vectors: gains by name of the parameter.

    Raises:
        QuantizationError: a bias was trained; the evaluation replaces weights only.
    """
    found: dict[int, dict[str, Tensor]] = {block: {} for block in range(stream.num_blocks + 1)}
    blocks = {name: index for index, name in enumerate(stream.block_names)}
    dense = {f"{name}.weight": w.dequantize(stream.dtype) for name, w in weights.items()} | dict(vectors)
    for name, tensor in dense.items():
        module, _, kind = name.rpartition(".")
        if kind != "weight":
            raise QuantizationError(f"{name}: a tuned bias cannot be evaluated; tune scales alone")
        inside = [index for name, index in blocks.items() if module.startswith(f"{name}.")]
        block = inside[0] if inside else stream.num_blocks
        found[block][module] = tensor
    return found
