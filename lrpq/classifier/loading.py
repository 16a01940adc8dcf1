"""Loading a quantized classifier: transformers' own model, its blocks computing on grids and codes.

    model = load_classifier(folder)
    logits = model(pixel_values=images).logits

A layer with codes whose inputs have a uniform grid is a `QuantizedLinear`: exact integer arithmetic.
What enters the products inside attention is rounded to grids, and these products are floating-point ones. Norms,
softmax, the activation function, patch embedding and classifier are transformers' own. Logits are those that
`lrpq.evaluate.classification` finds for the same codes and grids, bit for bit in the same batches on the same device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lrpq.activations.apply import quantized_block
from lrpq.activations.attention import POINTS, keep_points
from lrpq.activations.calibrate import BlockGrids, attention_of
from lrpq.activations.grids import UniformGrid, quantized
from lrpq.checkpoint.modules import WEIGHT
from lrpq.checkpoint.stored_activations import read_grids
from lrpq.classifier.layers import GridLinear, QuantizedLinear
from lrpq.classifier.packed_source import PackedSource
from lrpq.errors import CheckpointError
from lrpq.model.families import classifies_images
from lrpq.model.layers import LinearSpec
from lrpq.model.streaming import BlockStream
from lrpq.quant.grid import QuantizedWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredClassifier:
    """What a checkpoint holds, for evaluation block by block."""

    stream: BlockStream
    """The folded model with dequantized weights."""
    grids: Sequence[BlockGrids]
    """By block."""
    codes: Mapping[str, QuantizedWeight]

    def variant(self, index: int, block: nn.Module) -> AbstractContextManager[None]:
        """Scope in which a block of ``stream`` computes as quantized (lrpq.evaluate.classification.Variant)."""
        return quantized_block(self.stream, index, block, self.grids[index], self.codes)


def read_classifier(
    folder: Path | str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> StoredClassifier:
    """Read the codes and grids of a checkpoint.

    Args:
        folder: written by `write_classifier`.
        dtype: what is not integer arithmetic computes in; by default that of the checkpoint's configuration.
        device: where it computes.

    Raises:
        CheckpointError: the folder is no checkpoint of an image classifier, or is damaged; what is damaged is named.
        ModelError: a tensor is missing, or the configuration is of another architecture.
    """
    source = PackedSource(folder)
    if not classifies_images(source.config):
        named = ", ".join(getattr(source.config, "architectures", None) or ["no architecture"])
        raise CheckpointError(f"{folder}: {named} in config.json; expected an image classifier")
    stream = BlockStream(source, dtype=dtype or getattr(source.config, "dtype", None) or torch.float32, device=device)
    sites = [stream.sites(block) for block in range(stream.num_blocks)]
    grids = read_grids(source.checkpoint, sites, POINTS)
    codes = {spec.name: found for spec in stream.specs if (found := _codes(source, spec)) is not None}
    return StoredClassifier(stream=stream, grids=grids, codes=codes)


@torch.no_grad()
def load_classifier(folder: Path | str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Any:
    """The model of a checkpoint, in evaluation mode; called as transformers' own, it computes as quantized.

    Args:
        folder: written by `write_classifier`.
        dtype: what is not integer arithmetic computes in; by default that of the checkpoint's configuration.
        device: where it computes.

    Raises:
        LrpqError: see `read_classifier`.
        QuantizationError: codes cannot be multiplied in integer arithmetic; the layer is named.
    """
    stored = read_classifier(folder, dtype=dtype, device=device)
    stream, source, model = stored.stream, stored.stream.source, stored.stream.model

    def read(name: str) -> torch.Tensor:
        return source.read_rows(stream.stored(name)).to(stream.device, stream.dtype)

    for index, block in enumerate(stream.blocks):
        grids = stored.grids[index]
        for spec in stream.block_specs(index):
            grid, weight, layer = (
                grids.get(spec.input_site),
                stored.codes.get(spec.name),
                model.get_submodule(spec.name),
            )
            if weight is not None and isinstance(grid, UniformGrid):
                bias = None if layer.bias is None else read(f"{spec.name}.bias").cpu()  # where its codes are
                quantized_layer = QuantizedLinear(weight, bias, grid, name=spec.name).to(stream.device)
                model.set_submodule(spec.name, quantized_layer)
            elif grid is not None:
                model.set_submodule(spec.name, GridLinear(layer, grid))
        points = {point: partial(quantized, grid=grids[point]) for point in POINTS if point in grids}
        if points:
            keep_points(attention_of(stream, block), points)
    absent = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    model.load_state_dict({name: read(name) for name in absent}, strict=False, assign=True)
    return model.requires_grad_(False)


def _codes(source: PackedSource, spec: LinearSpec) -> QuantizedWeight | None:
    """Codes of a layer, which is one tensor on disk; None where it is dense."""
    if len(spec.stored) != 1:
        raise CheckpointError(f"module {spec.name}: is {len(spec.stored)} tensors in {source.folder}, expected one")
    return source.checkpoint.codes(spec.stored[0].removesuffix(WEIGHT))
