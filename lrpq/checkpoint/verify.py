"""Proof that a written checkpoint is what was meant: files, weights and logits, through the plain loader."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lrpq.checkpoint.assemble import CodeLoader
from lrpq.checkpoint.compared import Expected, compare_files, compare_logits, reloaded_logits
from lrpq.checkpoint.formats import FORMATS, CheckpointFormat
from lrpq.checkpoint.modules import ExpertScope, check_experts
from lrpq.checkpoint.plan import plan_checkpoint
from lrpq.errors import ConfigError
from lrpq.model.experts import loaded_weight
from lrpq.model.layers import Choice, LinearSpec
from lrpq.model.names import stored_names
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.skeleton import build_skeleton

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

TRANSFORMERS = "transformers"
WITH_LRPQ = "transformers with lrpq.loading"
PROBE_TOKENS = 32
PROBE_STRIDE = 7919  # a prime, so that the probe walks through any vocabulary instead of its first tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was compared; a mismatch is an error and has no result."""

    num_copied: int
    """Tensors of the source found in the files byte for byte."""
    num_modules: int
    """Quantized modules whose weights, decompressed by the loader, are bit for bit those of their codes; where
    nothing was loaded, modules whose codes and scales in the files are."""
    loader: str | None
    """``transformers``, of the trellis format with ``lrpq.loading``, or None where that does not load it (experts of
    several choices or of the trellis format; the GPTQ format, which takes other packages)."""
    num_tokens: int
    """Tokens of the probe; zero without a loader."""
    max_abs_difference: float | None
    """Largest difference of a logit to the dense model with the same dequantized weights; None without a probe."""
    tolerance: float
    """Largest difference that was allowed."""


def verify_checkpoint(
    output: Path,
    source: ModelSource,
    *,
    quantized: CodeLoader,
    choices: Mapping[str, Choice],
    specs: Sequence[LinearSpec] = (),
    format: CheckpointFormat = CheckpointFormat.COMPRESSED_TENSORS,
    input_ids: Int64[Tensor, "1 T"] | None = None,
    dense_logits: Callable[[Int64[Tensor, "1 T"]], Float[Tensor, "1 T vocab"]] | None = None,
    tolerance: float = 0.0,
) -> Verification:
    """Load ``output`` as a user would, and compare files, weights and logits with what was meant.

    Holds one model in host memory at a time: the reloaded one is gone before the dense one is loaded. What loads
    elsewhere only has its codes and scales compared in the files, and the result says that no logits were.

    Args:
        output: folder of the checkpoint.
        source: the original model.
        quantized: gives the codes of a module in ``choices``; called twice for each.
        choices: module name -> bits and group size, as written.
        specs: the model's linear layers, as written.
        format: as written.
        input_ids: a short window of tokens; by default 32 spread over the vocabulary.
        dense_logits: gives the logits of the dense model with the dequantized weights, in the dtype of the
            checkpoint; by default transformers runs the source with its weights replaced.
        tolerance: allowed difference of a logit. Zero is right where both sides run the same kernels on the
            same weights; dense logits from another device need more.

    Raises:
        CheckpointError: anything differs; the message names the tensor or module and by how much.
    """
    plan = plan_checkpoint(source, choices, specs=specs, format=format)
    modules = list(plan.modules.values())
    expected = Expected(quantized, modules, FORMATS[format])
    loader = _loader(choices, specs, format)
    if loader is None:
        num_copied = compare_files(output, source, plan, codes=expected)
        return Verification(
            num_copied=num_copied,
            num_modules=len(modules),
            loader=None,
            num_tokens=0,
            max_abs_difference=None,
            tolerance=tolerance,
        )
    num_copied = compare_files(output, source, plan, codes=None)
    if format is CheckpointFormat.TRELLIS:
        from lrpq.loading import register  # which changes what transformers knows

        register()
    ids = probe_ids(source.config.get_text_config().vocab_size) if input_ids is None else input_ids
    arguments = {"input_ids": ids}
    reloaded, dtype = reloaded_logits(AutoModelForCausalLM, output, source, plan, expected, arguments=arguments)
    if dense_logits is None:
        dense = _dense_logits(source, expected, specs, input_ids=ids, dtype=dtype)
    else:
        dense = dense_logits(ids)
    return Verification(
        num_copied=num_copied,
        num_modules=len(modules),
        loader=loader,
        num_tokens=ids.shape[1],
        max_abs_difference=compare_logits(output, reloaded, dense, tolerance=tolerance),
        tolerance=tolerance,
    )


def probe_ids(vocab_size: int, *, num_tokens: int = PROBE_TOKENS) -> Int64[Tensor, "1 T"]:
    """Token ids that are always the same and spread over the vocabulary."""
    return (torch.arange(1, num_tokens + 1) * PROBE_STRIDE % vocab_size)[None]


def _loader(choices: Mapping[str, Choice], specs: Sequence[LinearSpec], format: CheckpointFormat) -> str | None:
    """What loads the checkpoint: see ``Verification.loader``."""
    if format is CheckpointFormat.DENSE:
        return TRANSFORMERS
    if format is CheckpointFormat.GPTQ:
        return None
    if format is CheckpointFormat.TRELLIS:
        packed_experts = any(spec.routed and spec.name in choices for spec in specs)
        return None if packed_experts else WITH_LRPQ
    try:
        check_experts(choices, specs, scope=ExpertScope.MODEL, loader=TRANSFORMERS)
    except ConfigError:
        return None
    return TRANSFORMERS


@torch.no_grad()
def _dense_logits(
    source: ModelSource,
    expected: Expected,
    specs: Sequence[LinearSpec],
    *,
    input_ids: Int64[Tensor, "1 T"],
    dtype: torch.dtype,
) -> Float[Tensor, "1 T vocab"]:
    """Logits of the source, run densely by transformers, with the quantized modules' weights replaced."""
    model = _dense_model(source, specs, dtype)
    for module in expected.modules:
        loaded_weight(model, module.name).copy_(expected.weight(module, dtype))
    logits: Tensor = model(input_ids).logits
    return logits


def _dense_model(source: ModelSource, specs: Sequence[LinearSpec], dtype: torch.dtype) -> Any:
    """The source as transformers runs it; one that is read as another model, as that one."""
    if source.as_on_disk:
        return AutoModelForCausalLM.from_pretrained(source.folder, dtype=dtype, local_files_only=True).eval()
    model = build_skeleton(source.config, dtype=dtype, device=torch.device("cpu"))
    weights = {name: source.read(stored).to(dtype) for name, stored in stored_names(model, source).items()}
    model.load_state_dict({name: w.contiguous() for name, w in weights.items()}, strict=False, assign=True)
    model.tie_weights()
    for parameter_of, name in _absent(model):  # experts, which are one tensor in the model and many on disk
        parameter_of.register_parameter(name, _empty_like(parameter_of.get_parameter(name)))
    for spec in (spec for spec in specs if spec.routed):
        loaded_weight(model, spec.name).copy_(torch.cat([source.read(name) for name in spec.stored]))
    return model


def _absent(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Parameters without values: the module that holds each, and its name there."""
    return [
        (module, name)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.is_meta
    ]


def _empty_like(parameter: nn.Parameter) -> nn.Parameter:
    """The same on the host, full of NaN until it is written."""
    values = torch.full(parameter.shape, float("nan"), dtype=parameter.dtype, device="cpu")
    return nn.Parameter(values, requires_grad=False)
