"""Quantized modules by their names on disk, and what a loader can take of experts."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from lrpq.checkpoint.layout import StoredTensor
from lrpq.errors import ConfigError, ModelError
from lrpq.model.layers import Choice, LinearSpec
from lrpq.model.safetensors_source import ModelSource
from lrpq.quant.grid import QuantizedWeight
from lrpq.quant.trellis import check_parts

WEIGHT = ".weight"


class ExpertScope(enum.Enum):
    """Which experts a loader runs with one choice."""

    MODEL = "model"
    """transformers dequantizes experts while it loads them, all of them by one scheme (its
    integrations/compressed_tensors.py), and once anything in a checkpoint is packed it reads no dense experts."""
    BLOCK = "block"
    """vLLM and GPTQ kernels run the experts of a block as one layer, or all of them dense."""
    ANY = "any"
    """Dense weights are each their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedModule:
    """A module to quantize and the tensors on disk whose rows, one after the other, are its weight."""

    name: str
    """Module name in the model as it is streamed."""
    choice: Choice
    originals: tuple[StoredTensor, ...]
    routed: bool
    """An expert's: the loaded model has no module of this name."""

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows of each of the tensors."""
        return tuple(original.shape[0] for original in self.originals)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight, [d_out, d_in]."""
        return sum(self.rows), self.originals[0].shape[1]

    def split(self, weight: QuantizedWeight) -> Iterator[tuple[QuantizedWeight, StoredTensor]]:
        """Codes of each of the tensors.

        Raises:
            QuantizationError: streams of a trellis would be cut.
        """
        if weight.choice.trellis:
            check_parts(self.rows, name=self.name)
        return zip(weight.split(self.rows), self.originals, strict=True)


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
            originals=tuple(
                StoredTensor(name=tensor, dtype=source.dtype(tensor), shape=tuple(shape))
                for tensor, shape in zip(tensors, shapes, strict=True)
            ),
            routed=spec is not None and spec.routed,
        )
        if spec is not None and module.shape != (spec.d_out, spec.d_in):
            raise ModelError(
                f"module {name}: is {list(module.shape)} in {source.folder}, expected {[spec.d_out, spec.d_in]}"
            )
        found[name] = module
    return found


def check_experts(
    choices: Mapping[str, Choice], specs: Iterable[LinearSpec], *, scope: ExpertScope, loader: str
) -> None:
    """Refuse experts that the loader would read wrongly or not at all.

    Raises:
        ConfigError: two experts that must share a choice do not, both are named; or experts that must be packed are
            dense.
    """
    first: dict[str, tuple[str, Choice | None]] = {}
    for spec in specs:
        if not spec.routed or scope is ExpertScope.ANY:
            continue
        choice = choices.get(spec.name)
        other, shared = first.setdefault(spec.fused_group if scope is ExpertScope.BLOCK else "", (spec.name, choice))
        if choice != shared:
            raise ConfigError(
                f"experts {other} and {spec.name}: {_words(shared)} and {_words(choice)}, but {loader} loads all "
                f"experts of a {scope.value} with one choice; give them one"
                + (", or make the checkpoint for vLLM (--target vllm)" if scope is ExpertScope.MODEL else "")
            )
    if scope is ExpertScope.MODEL and choices and "" in first and first[""][1] is None:
        raise ConfigError(
            f"expert {first[''][0]}: left dense, but {loader} loads no dense experts from a checkpoint with packed "
            f"layers ({next(iter(choices))}); quantize the experts too, or make the checkpoint for vLLM (--target vllm)"
        )


def _words(choice: Choice | None) -> str:
    return "dense" if choice is None else str(choice)
