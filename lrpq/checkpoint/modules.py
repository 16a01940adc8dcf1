"""Quantized modules by their names on disk, and what a loader can take of experts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lrpq.allocate.targets import Target
from lrpq.errors import ConfigError, ModelError
from lrpq.model.layers import Choice, LinearSpec
from lrpq.model.safetensors_source import ModelSource

WEIGHT = ".weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedModule:
    """A module to quantize and the tensors on disk whose rows, one after the other, are its weight."""

    name: str
    """Module name in the model as it is streamed."""
    choice: Choice
    stems: tuple[str, ...]
    """Names on disk without ``.weight``."""
    rows: tuple[int, ...]
    """Rows of each of them."""
    d_in: int
    routed: bool
    """An expert's: the loaded model has no module of this name."""

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight, [d_out, d_in]."""
        return sum(self.rows), self.d_in


def quantized_modules(
    source: ModelSource, choices: Mapping[str, Choice], specs: Sequence[LinearSpec]
) -> dict[str, QuantizedModule]:
    """The modules of ``choices`` as they lie on disk, by name.

    Args:
        source: the original.
        choices: module name -> bits and group size.
        specs: the model's linear layers; one without a spec is ``name + '.weight'`` on disk.

    Raises:
        ConfigError: nothing is quantized.
        ModelError: a module has no matrix in the source, or its spec does not fit what is there.
    """
    if not choices:
        raise ConfigError("no module is quantized: the checkpoint would equal the original; give at least one choice")
    by_name = {spec.name: spec for spec in specs}
    found: dict[str, QuantizedModule] = {}
    on_disk = set(source.names())
    for name, choice in choices.items():
        spec = by_name.get(name)
        tensors = spec.stored if spec is not None else (name + WEIGHT,)
        absent = [tensor for tensor in tensors if tensor not in on_disk or not tensor.endswith(WEIGHT)]
        if absent:
            raise ModelError(
                f"module {name}: has no weight in {source.folder} (no tensor {absent[0]}); "
                "name modules of this model only"
            )
        shapes = [source.shape(tensor) for tensor in tensors]
        if any(len(shape) != 2 for shape in shapes) or len({shape[-1] for shape in shapes}) != 1:
            raise ModelError(f"module {name}: its weight has shape {list(shapes[0])}; expected a matrix")
        module = QuantizedModule(
            name=name,
            choice=choice,
            stems=tuple(tensor.removesuffix(WEIGHT) for tensor in tensors),
            rows=tuple(shape[0] for shape in shapes),
            d_in=shapes[0][1],
            routed=spec is not None and spec.routed,
        )
        if spec is not None and module.shape != (spec.d_out, spec.d_in):
            raise ModelError(
                f"module {name}: is {list(module.shape)} in {source.folder}, expected {[spec.d_out, spec.d_in]}"
            )
        found[name] = module
    return found


def check_experts(choices: Mapping[str, Choice], specs: Iterable[LinearSpec], target: Target) -> None:
    """Refuse experts that the loader would read wrongly or not at all.

    transformers dequantizes experts while it loads them, all of them by one scheme, and once anything in a checkpoint
    is packed it reads no dense experts. vLLM runs the experts of a block under one scheme, or all of them dense.

    Raises:
        ConfigError: two experts that must share a choice do not; both are named.
    """
    first: dict[str, tuple[str, Choice | None]] = {}
    for spec in specs:
        if not spec.routed:
            continue
        choice = choices.get(spec.name)
        scope = "" if target is Target.TRANSFORMERS else spec.fused_group
        other, shared = first.setdefault(scope, (spec.name, choice))
        if choice != shared:
            where = "a model" if target is Target.TRANSFORMERS else "a block"
            raise ConfigError(
                f"experts {other} and {spec.name}: {_words(shared)} and {_words(choice)}, but {target.value} loads all "
                f"experts of {where} with one choice; "
                + (
                    "give one to all experts, or make the checkpoint for vLLM (--target vllm)"
                    if target is Target.TRANSFORMERS
                    else "give one to all experts of a block"
                )
            )
    if target is Target.TRANSFORMERS and choices and "" in first and first[""][1] is None:
        raise ConfigError(
            f"expert {first[''][0]}: left dense, but transformers loads no dense experts from a checkpoint with packed "
            f"layers ({next(iter(choices))}); quantize the experts too, or make the checkpoint for vLLM (--target vllm)"
        )


def load_with_transformers(choices: Mapping[str, Choice], specs: Iterable[LinearSpec]) -> bool:
    """Whether plain transformers loads a checkpoint of these choices."""
    try:
        check_experts(choices, specs, Target.TRANSFORMERS)
    except ConfigError:
        return False
    return True


def _words(choice: Choice | None) -> str:
    return "dense" if choice is None else str(choice)
