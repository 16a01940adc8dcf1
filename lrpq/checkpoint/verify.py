"""Proof that a written checkpoint is what was meant: files, weights and logits, through the plain loader."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lrpq.checkpoint.assemble import CodeLoader, codes_of
from lrpq.checkpoint.compressed_tensors import SHAPE
from lrpq.checkpoint.formats import FORMATS, CheckpointFormat, WeightFormat
from lrpq.checkpoint.layout import StoredTensor
from lrpq.checkpoint.modules import WEIGHT, ExpertScope, QuantizedModule, check_experts
from lrpq.checkpoint.plan import CheckpointPlan, plan_checkpoint
from lrpq.errors import CheckpointError, ConfigError
from lrpq.model.experts import loaded_weight
from lrpq.model.layers import Choice, LinearSpec
from lrpq.model.names import stored_names
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.skeleton import build_skeleton
from lrpq.quant.grid import QuantizedWeight

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

TRANSFORMERS = "transformers"
PROBE_TOKENS = 32
PROBE_STRIDE = 7919  # a prime, so that the probe walks through any vocabulary instead of its first tokens
LOADING_ERRORS = (OSError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was compared; a mismatch is an error and has no result."""

    num_copied: int
    """Tensors of the source found in the files byte for byte."""
    num_modules: int
    """Quantized modules whose weights, decompressed by the loader, are bit for bit those of their codes; where
    nothing was loaded, modules whose codes and scales in the files are."""
    loader: str | None
    """``transformers``, or None where that does not load it (experts of several choices; the GPTQ format, which takes
    other packages)."""
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
    expected = _Expected(quantized, modules, FORMATS[format])
    loader = _loader(choices, specs, format)
    if loader is None:
        num_copied = _compare_files(output, source, plan, codes=expected)
        return Verification(
            num_copied=num_copied,
            num_modules=len(modules),
            loader=None,
            num_tokens=0,
            max_abs_difference=None,
            tolerance=tolerance,
        )
    num_copied = _compare_files(output, source, plan, codes=None)
    ids = probe_ids(source.config.get_text_config().vocab_size) if input_ids is None else input_ids
    reloaded, dtype = _reloaded_logits(output, source, plan, expected, input_ids=ids)
    if dense_logits is None:
        dense = _dense_logits(source, expected, specs, input_ids=ids, dtype=dtype)
    else:
        dense = dense_logits(ids)
    return Verification(
        num_copied=num_copied,
        num_modules=len(modules),
        loader=loader,
        num_tokens=ids.shape[1],
        max_abs_difference=_compare_logits(output, reloaded, dense, tolerance=tolerance),
        tolerance=tolerance,
    )


def probe_ids(vocab_size: int, *, num_tokens: int = PROBE_TOKENS) -> Int64[Tensor, "1 T"]:
    """Token ids that are always the same and spread over the vocabulary."""
    return (torch.arange(1, num_tokens + 1) * PROBE_STRIDE % vocab_size)[None]


class _Expected:
    """What the loaded model must hold."""

    def __init__(self, quantized: CodeLoader, modules: Sequence[QuantizedModule], format: WeightFormat) -> None:
        self.modules = modules
        self._quantized = quantized
        self._format = format

    def weight(self, module: QuantizedModule, dtype: torch.dtype) -> Float[Tensor, "d_out d_in"]:
        """The module's dequantized weight as the loader computes it."""
        return torch.cat([self._format.dequantize(part, original, dtype) for part, original in self._parts(module)])

    def stored(self, module: QuantizedModule) -> dict[str, Tensor]:
        """The module's tensors in the files, by name."""
        packed = [self._format.pack(part, original) for part, original in self._parts(module)]
        return {name: values for tensors in packed for name, values in tensors.items()}

    def _parts(self, module: QuantizedModule) -> Iterator[tuple[QuantizedWeight, StoredTensor]]:
        return module.split(codes_of(module.name, self._quantized, choice=module.choice, shape=module.shape))


def _loader(choices: Mapping[str, Choice], specs: Sequence[LinearSpec], format: CheckpointFormat) -> str | None:
    """What loads the checkpoint: see ``Verification.loader``."""
    if format is CheckpointFormat.DENSE:
        return TRANSFORMERS
    if format is CheckpointFormat.GPTQ:
        return None
    try:
        check_experts(choices, specs, scope=ExpertScope.MODEL, loader=TRANSFORMERS)
    except ConfigError:
        return None
    return TRANSFORMERS


@torch.no_grad()
def _dense_logits(
    source: ModelSource,
    expected: _Expected,
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


def _compare_files(output: Path, source: ModelSource, plan: CheckpointPlan, *, codes: _Expected | None) -> int:
    """Check names, dtypes and shapes of all tensors, and the values of those that were copied.

    With ``codes``, also the values of all others.
    """
    planned = {t.name: t for shard in plan.shards for unit in shard.units for t in unit}
    shapes = {
        f"{original.name.removesuffix(WEIGHT)}.{SHAPE}": original.shape
        for module in plan.modules.values()
        for original in module.originals
    }
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
                    elif name in shapes:
                        # transformers does not read the number of rows, other loaders do
                        _compare(f"tensor {name} in {path}", tensor, torch.tensor(shapes[name]))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: truncated or damaged ({error}); write the checkpoint again") from error
    missing = sorted(set(planned) - set(found))
    if missing:
        raise CheckpointError(f"{output}: tensor {missing[0]} is in none of its files")
    if codes is not None:
        for module in codes.modules:
            for name, values in codes.stored(module).items():
                with safe_open(found[name], framework="pt", device="cpu") as handle:
                    _compare(f"tensor {name} in {found[name]}", handle.get_tensor(name), values)
    return len(copied)


@torch.no_grad()
def _reloaded_logits(
    output: Path,
    source: ModelSource,
    plan: CheckpointPlan,
    expected: _Expected,
    *,
    input_ids: Int64[Tensor, "1 T"],
) -> tuple[Float[Tensor, "1 T vocab"], torch.dtype]:
    """Load the checkpoint, run it (the first forward decompresses) and check the quantized weights."""
    try:
        model, report = AutoModelForCausalLM.from_pretrained(output, local_files_only=True, output_loading_info=True)
        _check_report(output, model, source, plan, report)
        logits: Tensor = model.eval()(input_ids).logits
    except LOADING_ERRORS as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{output}: does not load and run with transformers ({reason})") from error
    dtype: torch.dtype = model.dtype
    for module in expected.modules:
        try:
            weight = loaded_weight(model, module.name)
        except AttributeError as error:
            raise CheckpointError(f"module {module.name}: has no weight in the loaded model ({error})") from error
        _compare(f"module {module.name}", weight, expected.weight(module, dtype))
    return logits, dtype


def _check_report(
    output: Path, model: nn.Module, source: ModelSource, plan: CheckpointPlan, report: Mapping[str, Any]
) -> None:
    """Refuse a load that left something out, but for what the original stores and no loader reads."""
    copied = set(plan.copied)
    unread = {name for name, stored in stored_names(model, source).items() if stored in copied}
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = set(report.get(kind) or ()) - (unread if kind == "unexpected_keys" else set())
        if names:
            raise CheckpointError(f"{output}: loading reports {kind.replace('_', ' ')}: {min(names)}")


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
