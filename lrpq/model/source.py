"""Opening a model folder: as it is, or as the architecture that computes the same with plain linear layers."""

from __future__ import annotations

from pathlib import Path

from lrpq.model.gpt2 import ARCHITECTURE as GPT2
from lrpq.model.gpt2 import GPT2AsOPT
from lrpq.model.safetensors_source import ModelSource


def open_source(folder: Path | str) -> ModelSource:
    """The tensors and the configuration of a model folder.

    Raises:
        ModelError: the folder is not a readable model, or one whose conversion is not exact.
    """
    source = ModelSource(folder)
    if GPT2 in (getattr(source.config, "architectures", None) or []):
        return GPT2AsOPT(folder)
    return source
