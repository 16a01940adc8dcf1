"""Names on disk and names in the model: transformers renames while it loads, and so does lrpq."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key

from lrpq.errors import ModelError
from lrpq.model.safetensors_source import ORIGINAL_WANTED, ModelSource


def stored_names(model: Any, source: ModelSource) -> Mapping[str, str]:
    """Name in the model -> name on disk, by transformers' own renamings for this architecture.

    Renamings only: what transformers merges while loading (experts) keeps one name a tensor here. Tensors that the
    model does not have are in the result too, under the name that renaming gives them.

    Args:
        model: the model as transformers builds it.
        source: what is on disk.

    Raises:
        ModelError: two tensors on disk have one name in the model.
    """
    renamings = [t for t in get_model_conversion_mapping(model) if not isinstance(t, WeightConverter)]
    own = model.state_dict()
    found: dict[str, str] = {}
    for stored in source.names():
        name, _ = rename_source_key(stored, renamings, [], model.base_model_prefix, own)
        if name in found:
            raise ModelError(f"model {source.folder}: tensors {found[name]} and {stored} are both {name}")
        found[name] = stored
    return found


def tie(names: dict[str, tuple[str, ...]], first: str, second: str) -> None:
    """Where only one of two tied tensors is on disk, it serves for both."""
    for here, there in ((first, second), (second, first)):
        if here not in names and there in names:
            names[here] = names[there]


def check_shapes(modules: Mapping[str, nn.Module], names: Mapping[str, tuple[str, ...]], source: ModelSource) -> None:
    """Compare every tensor of some modules of the model, by path, with what is on disk, before any is read.

    Raises:
        ModelError: a tensor is missing or has another shape than config.json describes; it is named.
    """
    for path, module in modules.items():
        for local, tensor in module.state_dict().items():
            name = f"{path}.{local}"
            stored = names.get(name, (name,))
            shapes, wanted = [source.shape(part) for part in stored], tuple(tensor.shape)
            if len(shapes) == 1:
                fits = shapes[0] == wanted
            else:
                fits = all(shape[1:] == wanted[1:] for shape in shapes) and sum(s[0] for s in shapes) == wanted[0]
            whole = [part for part in stored if not source.dtype(part).is_floating_point]
            if whole and tensor.is_floating_point():
                raise ModelError(f"tensor {whole[0]} in {source.folder}: holds whole numbers; {ORIGINAL_WANTED}")
            if not fits:
                raise ModelError(
                    f"tensor {stored[0]}: shape {shapes[0]}, config.json asks for {wanted}"
                    + (f" in {len(stored)} parts" if len(stored) > 1 else "")
                )
