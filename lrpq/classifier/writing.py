"""Writing a quantized classifier: the checkpoint of a language model, and the grids of its activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lrpq.activations.grids import UniformGrid
from lrpq.checkpoint.activations import BlockGrids, stored_activations
from lrpq.checkpoint.assemble import CodeLoader, write_checkpoint
from lrpq.checkpoint.plan import MAX_SHARD_BYTES, CheckpointSize
from lrpq.errors import QuantizationError
from lrpq.model.layers import Choice, LinearSpec
from lrpq.model.safetensors_source import ModelSource

PER_ROW = -1


def write_classifier(
    source: ModelSource,
    output: Path,
    *,
    quantized: CodeLoader,
    choices: Mapping[str, Choice],
    specs: Sequence[LinearSpec],
    grids: Sequence[BlockGrids],
    manifest: Mapping[str, Any],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    prove: Callable[[Path], object] | None = None,
) -> CheckpointSize:
    """Write a classifier to ``output``, which appears complete or not at all.

    Args:
        source: the folded model, or the original where nothing is folded; patch embedding, norms, classifier and the
            layers that are not in ``choices`` are copied from it as they are.
        output: a new or empty folder.
        quantized: gives the codes of a module in ``choices``; called once for each.
        choices: module name -> bits; one scale a row (group size -1), where its inputs have a grid.
        specs: the model's linear layers (``BlockStream.specs``).
        grids: by block; input site or point of attention -> grid. Empty, or of empty mappings: activations stay in
            full precision, and the checkpoint is one that transformers loads alone.
        manifest: contents of ``lrpq.json``.
        max_shard_bytes: bytes of tensors in a file.
        overwrite: replace a checkpoint that lies at ``output`` once the new one is complete.
        prove: called with the complete folder before it is published (`verify_classifier`); what it raises leaves
            ``output`` untouched.

    Raises:
        QuantizationError: a layer has more than one scale a row and inputs on a uniform grid: no integer arithmetic.
        LrpqError: see `lrpq.checkpoint.assemble.write_checkpoint` and `stored_activations`.
    """
    for spec in specs:
        on_grid = spec.block < len(grids) and isinstance(grids[spec.block].get(spec.input_site), UniformGrid)
        if on_grid and spec.name in choices and choices[spec.name].group_size != PER_ROW:
            raise QuantizationError(
                f"{spec.name}: {choices[spec.name]} with quantized inputs; integer arithmetic needs one scale a row, "
                f"group size {PER_ROW}"
            )
    return write_checkpoint(
        source,
        output,
        quantized=quantized,
        choices=choices,
        specs=specs,
        manifest=manifest,
        activations=stored_activations(specs, grids, packed=choices) if any(grids) else None,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        prove=prove,
    )
