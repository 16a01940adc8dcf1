"""Loading a checkpoint with transformers, around one of its faults.

transformers 5.23 runs every class's weight initialisation while it loads. That of GPTBigCode takes ``c_proj.weight``
of every attention and MLP, which a packed layer does not have until its first forward: plain ``from_pretrained``
raises AttributeError for any packed GPTBigCode model, whoever wrote it. Nothing is to be initialised there, so for
the length of a load the step is left out for packed layers. All other architectures load without this.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, GPTBigCodePreTrainedModel

from lrpq.errors import CheckpointError

FAULTY = frozenset({"gpt_bigcode"})
"""Model types that plain transformers does not load packed."""


def load_checkpoint(folder: Path, **options: Any) -> Any:
    """``AutoModelForCausalLM.from_pretrained`` for checkpoints of every supported architecture.

    Raises:
        CheckpointError: there is no such folder.
    """
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint {folder}: no such folder")
    with packed_projections():
        return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **options)


@contextmanager
def packed_projections() -> Iterator[None]:
    """GPTBigCode's weight initialisation leaves packed layers alone for the length of the context."""
    original = GPTBigCodePreTrainedModel._init_weights

    def initialise(self: Any, module: nn.Module) -> None:
        projection = getattr(module, "c_proj", None)
        if projection is None or hasattr(projection, "weight"):
            original(self, module)

    GPTBigCodePreTrainedModel._init_weights = initialise
    try:
        yield
    finally:
        GPTBigCodePreTrainedModel._init_weights = original
