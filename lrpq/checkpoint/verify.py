"""Proof that a written checkpoint is what was meant: files, weights and logits, through the plain loader."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lrpq.checkpoint.assemble import CodeLoader, codes_of
from lrpq.checkpoint.compressed_tensors import SHAPE
from lrpq.checkpoint.plan import WEIGHT, CheckpointPlan, TensorSource, plan_checkpoint
from lrpq.errors import CheckpointError
from lrpq.model.layers import Choice

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

PROBE_TOKENS = 32
PROBE_STRIDE = 7919  # a prime, so that the probe walks through any vocabulary instead of its first tokens
LOADING_ERRORS = (OSError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was compared; a mismatch is an error and has no result."""

    num_copied: int
    """Tensors of the source found in the files byte for byte."""
    num_modules: int
    """Quantized modules whose weights, decompressed by the loader, are bit for bit those of their codes."""
    num_tokens: int
    max_abs_difference: float
    """Largest difference of a logit to the dense model with the same dequantized weights."""
    tolerance: float
    """Largest difference that was allowed."""


def verify_checkpoint(
    output: Path,
    source: TensorSource,
    *,
    quantized: CodeLoader,
    choices: Mapping[str, Choice],
    input_ids: Int64[Tensor, "1 T"] | None = None,
    dense_logits: Callable[[Int64[Tensor, "1 T"]], Float[Tensor, "1 T vocab"]] | None = None,
    tolerance: float = 0.0,
) -> Verification:
    """Load ``output`` as a user would, and compare files, weights and logits with what was meant.

    Holds one model in host memory at a time: the reloaded one is gone before the dense one is loaded.

    Args:
        output: folder of the checkpoint.
        source: the original model.
        quantized: gives the codes of a module in ``choices``; called twice for each.
        choices: module name -> bits and group size, as written.
        input_ids: a short window of tokens; by default 32 spread over the vocabulary.
        dense_logits: gives the logits of the dense model with the dequantized weights, in the dtype of the
            checkpoint; by default transformers runs the source with its weights replaced.
        tolerance: allowed difference of a logit. Zero is right where both sides run the same kernels on the
            same weights; dense logits from another device need more.

    Raises:
        CheckpointError: anything differs; the message names the tensor or module and by how much.
    """
    plan = plan_checkpoint(source, choices)
    num_copied = _compare_files(output, source, plan)
    ids = probe_ids(source.config.get_text_config().vocab_size) if input_ids is None else input_ids
    reloaded, dtype = _reloaded_logits(output, source, quantized=quantized, choices=choices, input_ids=ids)
    if dense_logits is None:
        dense = dequantized_logits(source, quantized=quantized, choices=choices, input_ids=ids, dtype=dtype)
    else:
        dense = dense_logits(ids)
    return Verification(
        num_copied=num_copied,
        num_modules=len(choices),
        num_tokens=ids.shape[1],
        max_abs_difference=_compare_logits(output, reloaded, dense, tolerance=tolerance),
        tolerance=tolerance,
    )


def probe_ids(vocab_size: int, *, num_tokens: int = PROBE_TOKENS) -> Int64[Tensor, "1 T"]:
    """Token ids that are always the same and spread over the vocabulary."""
    return (torch.arange(1, num_tokens + 1) * PROBE_STRIDE % vocab_size)[None]


@torch.no_grad()
def dequantized_logits(
    source: TensorSource,
    *,
    quantized: CodeLoader,
    choices: Mapping[str, Choice],
    input_ids: Int64[Tensor, "1 T"],
    dtype: torch.dtype,
) -> Float[Tensor, "1 T vocab"]:
    """Logits of the source, run densely by transformers, with the quantized modules' weights replaced."""
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=dtype, local_files_only=True).eval()
    for module in choices:
        weight = _weight(model, module)
        codes = codes_of(module, quantized, choice=choices[module], shape=tuple(weight.shape))
        weight.copy_(codes.dequantize(dtype))
    logits: Tensor = model(input_ids).logits
    return logits


def _compare_files(output: Path, source: TensorSource, plan: CheckpointPlan) -> int:
    """Check names, dtypes and shapes of all tensors, and the values of those that were copied."""
    planned = {t.name: t for shard in plan.shards for unit in shard.units for t in unit}
    found: dict[str, Path] = {}
    copied = set(plan.copied)
    for path in sorted(output.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt", device="cpu") as handle:
                for name in handle.keys():  # noqa: SIM118 - not a mapping
                    if name in found:
                        raise CheckpointError(f"tensor {name}: is in {found[name].name} and in {path.name}")
                    found[name] = path
                    if name not in planned:
                        raise CheckpointError(f"tensor {name} in {path}: was not meant to be written")
                    tensor = handle.get_tensor(name)
                    if tensor.dtype != planned[name].dtype or tuple(tensor.shape) != planned[name].shape:
                        raise CheckpointError(
                            f"tensor {name} in {path}: is {tensor.dtype} {list(tensor.shape)}; "
                            f"expected {planned[name].dtype} {list(planned[name].shape)}"
                        )
                    if name in copied:
                        _compare(f"tensor {name} in {path}", tensor, source.read(name))
                    elif name.endswith(f".{SHAPE}"):
                        # transformers does not read the number of rows, other loaders do
                        shape = source.shape(name.removesuffix(f".{SHAPE}") + WEIGHT)
                        _compare(f"tensor {name} in {path}", tensor, torch.tensor(shape))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: truncated or damaged ({error}); write the checkpoint again") from error
    missing = sorted(set(planned) - set(found))
    if missing:
        raise CheckpointError(f"{output}: tensor {missing[0]} is in none of its files")
    return len(copied)


@torch.no_grad()
def _reloaded_logits(
    output: Path,
    source: TensorSource,
    *,
    quantized: CodeLoader,
    choices: Mapping[str, Choice],
    input_ids: Int64[Tensor, "1 T"],
) -> tuple[Float[Tensor, "1 T vocab"], torch.dtype]:
    """Load the checkpoint, run it (the first forward decompresses) and check the quantized weights."""
    try:
        model, report = AutoModelForCausalLM.from_pretrained(output, local_files_only=True, output_loading_info=True)
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if report.get(kind):
                raise CheckpointError(f"{output}: loading reports {kind.replace('_', ' ')}: {min(report[kind])}")
        logits: Tensor = model.eval()(input_ids).logits
    except LOADING_ERRORS as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{output}: does not load and run with transformers ({reason})") from error
    dtype: torch.dtype = model.dtype
    for module, choice in choices.items():
        weight = _weight(model, module)
        codes = codes_of(module, quantized, choice=choice, shape=source.shape(module + WEIGHT))
        _compare(f"module {module}", weight, codes.dequantize(dtype))
    return logits, dtype


def _weight(model: nn.Module, module: str) -> Tensor:
    try:
        weight = model.get_submodule(module).weight
    except AttributeError as error:
        raise CheckpointError(f"module {module}: has no weight in the loaded model ({error})") from error
    assert isinstance(weight, Tensor)
    return weight


def _compare(what: str, found: Tensor, expected: Tensor) -> None:
    """Raise unless two tensors have the same bits."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        raise CheckpointError(
            f"{what}: is {found.dtype} {list(found.shape)}; expected {expected.dtype} {list(expected.shape)}"
        )
    # comparing bytes, not numbers: -0.0 is not 0.0 here and NaN equals itself
    pair = [t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (found, expected)]
    if not torch.equal(*pair):
        difference = (found.double() - expected.double()).abs()
        raise CheckpointError(
            f"{what}: {int((difference != 0).sum())} of {found.numel()} values differ, "
            f"by up to {difference.max().item():.3g}; the checkpoint is damaged, write it again"
        )


def _compare_logits(output: Path, found: Tensor, expected: Tensor, *, tolerance: float) -> float:
    if found.dtype != expected.dtype or found.shape != expected.shape:
        raise CheckpointError(
            f"{output}: logits are {found.dtype} {list(found.shape)}; "
            f"expected {expected.dtype} {list(expected.shape)} from the dense model"
        )
    if not bool(torch.isfinite(found).all()):
        raise CheckpointError(f"{output}: logits are not finite")
    difference = (found.double() - expected.double()).abs().amax(-1)[0]
    largest = difference.max().item()
    if not largest <= tolerance:  # also when the dense logits hold NaN
        raise CheckpointError(
            f"{output}: logits differ from the dense dequantized model's by {largest:.3g} "
            f"at token {int(difference.argmax())}; at most {tolerance:g} is allowed"
        )
    return largest
