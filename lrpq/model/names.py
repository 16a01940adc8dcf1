"""Names on disk and names in the model: transformers renames while it loads, and so does lrpq."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key

from lrpq.errors import ModelError
from lrpq.model.safetensors_source import ModelSource


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
