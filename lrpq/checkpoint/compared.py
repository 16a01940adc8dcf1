"""A checkpoint against what was meant: its files, the weights of a loaded model, and logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lrpq.checkpoint.activations import StoredActivations, input_values
from lrpq.checkpoint.assemble import CodeLoader, codes_of
from lrpq.checkpoint.compressed_tensors import SHAPE
from lrpq.checkpoint.formats import WeightFormat
from lrpq.checkpoint.layout import StoredTensor
from lrpq.checkpoint.modules import WEIGHT, QuantizedModule
from lrpq.checkpoint.plan import CheckpointPlan
from lrpq.errors import CheckpointError
from lrpq.model.experts import loaded_weight
from lrpq.model.names import stored_names
from lrpq.model.safetensors_source import ModelSource
from lrpq.quant.grid import QuantizedWeight

if TYPE_CHECKING:
    from jaxtyping import Float

LOADING_ERRORS = (OSError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError)
"""What transformers raises for a checkpoint that it does not load."""


class Expected:
    """What the loaded model must hold."""

    def __init__(
        self,
        quantized: CodeLoader,
        modules: Sequence[QuantizedModule],
        format: WeightFormat,
        activations: StoredActivations | None = None,
    ) -> None:
        self.modules = modules
        self._quantized = quantized
        self._format = format
        self._inputs = activations.inputs if activations is not None else {}

    def weight(self, module: QuantizedModule, dtype: torch.dtype) -> Float[Tensor, "d_out d_in"]:
        """The module's dequantized weight as the loader computes it."""
        return torch.cat([self._format.dequantize(part, original, dtype) for part, original in self._parts(module)])

    def stored(self, module: QuantizedModule) -> dict[str, Tensor]:
        """The module's tensors in the files, by name."""
        packed = [self._format.pack(part, original) for part, original in self._parts(module)]
        if module.name in self._inputs:
            stems = [original.name.removesuffix(WEIGHT) for original in module.originals]
            packed += [input_values(stem, self._inputs[module.name]) for stem in stems]
        return {name: values for tensors in packed for name, values in tensors.items()}

    def inputs(self, module: QuantizedModule) -> dict[str, Tensor]:
        """Scale and zero point of the inputs, by their names in the loaded module; empty where there are none."""
        if module.name not in self._inputs:
            return {}
        values = input_values(module.name, self._inputs[module.name])
        return {name.removeprefix(f"{module.name}."): tensor for name, tensor in values.items()}

    def _parts(self, module: QuantizedModule) -> Iterator[tuple[QuantizedWeight, StoredTensor]]:
        return module.split(codes_of(module.name, self._quantized, choice=module.choice, shape=module.shape))


def compare_files(output: Path, source: ModelSource, plan: CheckpointPlan, *, codes: Expected | None) -> int:
    """Check names, dtypes and shapes of all tensors, and the values of those that were copied.

    With ``codes``, also the values of all others.

    Returns:
        The number of tensors that were copied.

    Raises:
        CheckpointError: a tensor differs, is missing or was not meant to be written, or a file is damaged.
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
                        compare(f"tensor {name} in {path}", tensor, source.read(name))
                    elif name in shapes:
                        # transformers does not read the number of rows, other loaders do
                        compare(f"tensor {name} in {path}", tensor, torch.tensor(shapes[name]))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: truncated or damaged ({error}); write the checkpoint again") from error
    missing = sorted(set(planned) - set(found))
    if missing:
        raise CheckpointError(f"{output}: tensor {missing[0]} is in none of its files")
    if codes is not None:
        for module in codes.modules:
            for name, values in codes.stored(module).items():
                with safe_open(found[name], framework="pt", device="cpu") as handle:
                    compare(f"tensor {name} in {found[name]}", handle.get_tensor(name), values)
    return len(copied)


@torch.no_grad()
def reloaded_logits(
    auto: Any,
    output: Path,
    source: ModelSource,
    plan: CheckpointPlan,
    expected: Expected,
    *,
    arguments: Mapping[str, Tensor],
) -> tuple[Tensor, torch.dtype]:
    """Load the checkpoint, run it (the first forward decompresses) and check the quantized weights.

    Args:
        auto: transformers' class to load it with.
        output: the checkpoint.
        source: what it was made of.
        plan: what was to be written.
        expected: the quantized modules.
        arguments: of the model's forward.

    Returns:
        Logits, and the dtype of the model.

    Raises:
        CheckpointError: it does not load and run, something was left out, or weights or grids of inputs differ.
    """
    try:
        model, report = auto.from_pretrained(output, local_files_only=True, output_loading_info=True)
        check_report(output, model, source, plan, report)
        logits: Tensor = model.eval()(**arguments).logits
    except LOADING_ERRORS as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{output}: does not load and run with transformers ({reason})") from error
    dtype: torch.dtype = model.dtype
    for module in expected.modules:
        try:
            weight = loaded_weight(model, module.name)
        except AttributeError as error:
            raise CheckpointError(f"module {module.name}: has no weight in the loaded model ({error})") from error
        compare(f"module {module.name}", weight, expected.weight(module, dtype))
        for part, values in expected.inputs(module).items():
            found = getattr(model.get_submodule(module.name), part, None)
            if found is None:
                raise CheckpointError(f"module {module.name}: has no {part} in the loaded model")
            compare(
                f"{part} of module {module.name}", found, values.to(dtype) if values.is_floating_point() else values
            )
    return logits, dtype


def check_report(
    output: Path, model: nn.Module, source: ModelSource, plan: CheckpointPlan, report: Mapping[str, Any]
) -> None:
    """Refuse a load that left something out, but for what the original stores and no loader reads.

    Raises:
        CheckpointError: ``report``, the loading info of transformers, names a key.
    """
    copied = set(plan.copied)
    unread = {name for name, stored in stored_names(model, source).items() if stored in copied}
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = set(report.get(kind) or ()) - (unread if kind == "unexpected_keys" else set())
        if names:
            raise CheckpointError(f"{output}: loading reports {kind.replace('_', ' ')}: {min(names)}")


def compare(what: str, found: Tensor, expected: Tensor) -> None:
    """Compare the bits of two tensors.

    Raises:
        CheckpointError: they differ, in ``what``.
    """
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


def compare_logits(output: Path, found: Tensor, expected: Tensor, *, tolerance: float, unit: str = "token") -> float:
    """Largest difference of a logit, of the first of several windows; ``unit`` is what has logits.

    Raises:
        CheckpointError: it is above the tolerance, or logits are not finite or of another shape or dtype.
    """
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
            f"at {unit} {int(difference.argmax())}; at most {tolerance:g} is allowed"
        )
    return largest
