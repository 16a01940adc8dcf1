"""Proof that a written classifier is what was meant: files, what transformers loads of it, and our loader's logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, PreTrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from lrpq.activations.apply import quantized_block
from lrpq.checkpoint.activations import TABLE, BlockGrids, stored_activations
from lrpq.checkpoint.assemble import CodeLoader
from lrpq.checkpoint.compared import Expected, compare_files, compare_logits, reloaded_logits
from lrpq.checkpoint.formats import FORMATS, CheckpointFormat
from lrpq.checkpoint.plan import plan_checkpoint
from lrpq.checkpoint.stored_activations import read_table
from lrpq.classifier.loading import load_classifier
from lrpq.errors import CheckpointError
from lrpq.evaluate.classification import class_logits
from lrpq.model.inputs import image_shape
from lrpq.model.layers import Choice, LinearSpec
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.streaming import BlockStream
from lrpq.quant.grid import QuantizedWeight

if TYPE_CHECKING:
    from jaxtyping import Float

PROBE_IMAGES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifierProof:
    """What was compared; a mismatch is an error and has no result."""

    num_copied: int
    """Tensors of the source found in the files byte for byte."""
    num_modules: int
    """Packed modules whose codes, scales and grids of inputs in the files are bit for bit those meant."""
    in_transformers: bool
    """Whether these were also compared as transformers with compressed-tensors loads them; there are architectures of
    which it loads nothing packed (`loads_packed`)."""
    num_grids: int
    """Grids of activations, of the table and of tensors."""
    num_images: int
    """Of the probe."""
    max_abs_difference: float
    """Largest difference of a logit of our loader to the evaluation of the same codes and grids."""
    transformers_difference: float | None
    """The same of transformers with compressed-tensors alone; None where it does not load the model, or activations are
    quantized, of which it computes a part."""


def verify_classifier(
    output: Path,
    source: ModelSource,
    *,
    quantized: CodeLoader,
    choices: Mapping[str, Choice],
    specs: Sequence[LinearSpec],
    grids: Sequence[BlockGrids],
    images: Float[Tensor, "n channels height width"] | None = None,
    tolerance: float = 0.0,
) -> ClassifierProof:
    """Load ``output`` with transformers and with our loader, and compare both with what was to be written.

    Args:
        output: folder of the checkpoint.
        source: as written, and so ``choices``, ``specs`` and ``grids``.
        quantized: gives the codes of a module in ``choices``; called once for each.
        choices: module name -> bits.
        specs: the model's linear layers.
        grids: by block.
        images: probe, preprocessed; by default four of noise.
        tolerance: allowed difference of a logit.

    Raises:
        CheckpointError: anything differs; the message names the tensor or module and by how much.
    """
    activations = stored_activations(specs, grids, packed=choices) if any(grids) else None
    plan = plan_checkpoint(source, choices, specs=specs, activations=activations)
    codes = {name: _codes(name, quantized) for name in choices}
    modules = list(plan.modules.values())
    expected = Expected(codes.__getitem__, modules, FORMATS[CheckpointFormat.COMPRESSED_TENSORS], activations)
    num_copied = compare_files(output, source, plan, codes=expected)
    if activations is not None and (read_table(output) is None or (output / TABLE).read_text() != activations.text):
        raise CheckpointError(f"{output / TABLE}: is not the table that was meant; write the checkpoint again")
    dtype = getattr(source.config, "dtype", None) or source.main_dtype()
    probe = (probe_images(source.config) if images is None else images).to(dtype)
    stream = BlockStream(source, dtype=dtype)
    by_transformers: Tensor | None = None
    if loads_packed(stream.model):
        by_transformers, _ = reloaded_logits(
            AutoModelForImageClassification, output, source, plan, expected, arguments={"pixel_values": probe}
        )
    by_us = load_classifier(output)(pixel_values=probe).logits.float()

    def variant(index: int, block: nn.Module) -> AbstractContextManager[None]:
        return quantized_block(stream, index, block, grids[index] if grids else {}, codes)

    meant = class_logits(stream, probe, variant, micro_batch=len(probe))

    def difference(logits: Tensor) -> float:
        return compare_logits(output, logits[None], meant[None], tolerance=tolerance, unit="image")

    return ClassifierProof(
        num_copied=num_copied,
        num_modules=len(modules),
        in_transformers=by_transformers is not None,
        num_grids=sum(map(len, grids)),
        num_images=len(probe),
        max_abs_difference=difference(by_us),
        transformers_difference=None
        if by_transformers is None or activations is not None
        else difference(by_transformers.float()),
    )


def loads_packed(model: Any) -> bool:
    """Whether transformers loads packed layers of this model.

    Where it cuts a stored tensor into several while loading (DINOv2 has such a rule for an MLP of three layers, whether
    or not the model has that MLP), transformers 5.23 with compressed-tensors fails before it reads anything.
    """
    rules = get_model_conversion_mapping(model)
    return not any(isinstance(rule, WeightConverter) and len(rule.target_patterns) > 1 for rule in rules)


def probe_images(config: PreTrainedConfig, *, num: int = PROBE_IMAGES) -> Float[Tensor, "n channels height width"]:
    """Normal noise of the size that the model reads."""
    return torch.randn(num, *image_shape(config), generator=torch.Generator().manual_seed(0))


def _codes(name: str, quantized: CodeLoader) -> QuantizedWeight:
    found = quantized(name)
    if found is None:
        raise CheckpointError(f"module {name}: has a choice but no codes; quantize it or leave it out")
    return found
