"""Windows in the store: a Parquet table with one row a window."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from tasks.store.objects import ObjectStore
from tasks.store.tables import read_table, write_table

KIND = "windows"


def write_windows(store: ObjectStore, key: str, tokens: Tensor) -> None:
    """Store token ids [num_windows, length]."""
    rows = pa.array(list(tokens.numpy().astype(np.int64)), type=pa.list_(pa.int64()))
    write_table(store, key, pa.table({"tokens": rows}), units={}, kind=KIND)


def read_windows(store: ObjectStore, key: str) -> Tensor:
    """Token ids, int64 [num_windows, length]."""
    column = read_table(store, key, KIND).column("tokens").combine_chunks()
    flat = column.values.to_numpy(zero_copy_only=False)
    return torch.from_numpy(flat.reshape(len(column), -1).astype(np.int64))
