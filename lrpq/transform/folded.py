"""A changed model without a copy of it: every tensor is folded when it is read.

What is read is one tensor of the original, and its folded values go through float64 in parts (`folds.folded`); powers
of two are multiplied where they lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, ClassVar

import torch
from torch import Tensor

from lrpq.errors import CheckpointError, ModelError
from lrpq.model.safetensors_source import ModelSource
from lrpq.transform.folds import FoldedTensor, FoldPlan, folded, powers_of_two, scaled_in_place


class FoldedSource(ModelSource):
    """A model as `write_folded` would write it; `read_rows` gives folded values as float32, before they are rounded.

    Args:
        source: the original.
        plan: what every tensor becomes.
        dtype: of all floating-point tensors; by default each keeps its own.
    """

    as_on_disk: ClassVar[bool] = False
    changed_by: ClassVar[str] = "folded"
    """What was done to the model, for messages."""
    instead: ClassVar[str] = "compress the model without quantized activations"
    """What to do where a value leaves its dtype's range."""

    def __init__(self, source: ModelSource, plan: FoldPlan, *, dtype: torch.dtype | None = None) -> None:
        self.plan = plan
        self._source = source  # everything public is answered from it
        self._dtype = dtype
        self.folder = source.folder
        unchanged = {name: FoldedTensor(name=name, origin=name, folds=()) for name in source.names()}
        self._made = unchanged | dict(plan.tensors)
        changes = dict(plan.config_changes)
        self._document = source.config_document()
        if dtype is not None:
            self._document.pop("torch_dtype", None)
            changes["dtype"] = str(dtype).removeprefix("torch.")
        self._document |= changes
        self.config = deepcopy(source.config)
        for field, value in changes.items():
            setattr(self.config, field, dtype if field == "dtype" else value)

    def config_document(self) -> dict[str, Any]:
        """The configuration to write."""
        return dict(self._document)

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._made)

    def __contains__(self, name: str) -> bool:
        return name in self._made

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return self._source.shape(self._tensor(name).origin)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor; see `ModelSource.dtype`."""
        stored = self._source.dtype(self._tensor(name).origin)
        return self._dtype if self._dtype is not None and stored.is_floating_point else stored

    def nbytes(self, name: str) -> int:
        """Bytes a tensor takes in its dtype."""
        origin = self._tensor(name).origin
        return self._source.nbytes(origin) // self._source.dtype(origin).itemsize * self.dtype(name).itemsize

    @property
    def original(self) -> ModelSource:
        """What lies on disk, below all folds."""
        return self._source.original if isinstance(self._source, FoldedSource) else self._source

    @property
    def unties_head(self) -> bool:
        """Whether the original's head is its embedding, and this model's is not."""
        return bool(self.original.config.tie_word_embeddings) and not self.config.tie_word_embeddings

    @property
    def added_bytes(self) -> int:
        """What the model has in tensors that the original does not have: a head that was the embedding."""
        return sum(self.nbytes(name) for name in self._made if name not in self.original)

    def read(self, name: str) -> Tensor:
        """Read one tensor, rounded once to its dtype; see `ModelSource.read`."""
        return self._folded(name, self._source.read(self._tensor(name).origin), self.dtype(name))

    def read_rows(self, names: Sequence[str]) -> Tensor:
        """Read tensors whose rows make one; what has more digits once it is folded as float32, or float64."""
        rows = [self._exact(name) for name in names]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def _exact(self, name: str) -> Tensor:
        values = self._source.read_rows([self._tensor(name).origin])  # of a folded source, before they are rounded
        if self._dtype is None and powers_of_two(self._tensor(name).folds) is not None:
            return self._folded(name, values, values.dtype)
        return self._folded(name, values, torch.promote_types(self.dtype(name), torch.float32))

    def _folded(self, name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
        made = self._tensor(name)
        if values.is_meta:
            return values
        if not made.folds:
            return values if self._dtype is None else values.to(self.dtype(name))
        powers = powers_of_two(made.folds) if dtype == values.dtype else None
        try:
            if powers is not None:
                return scaled_in_place(values, powers, name=name)  # they were read for this
            return folded(values, made.folds, dtype=dtype, name=name)
        except CheckpointError as error:
            raise ModelError(
                f"tensor {name} of {self.folder}, {self.changed_by}: a value leaves the range of {dtype}, in which it "
                f"is stored; {self.instead}"
            ) from error

    def _tensor(self, name: str) -> FoldedTensor:
        if name not in self._made:
            raise ModelError(f"model {self.folder}: tensor {name} is missing; the checkpoint is incomplete")
        return self._made[name]
