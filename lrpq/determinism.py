"""The same inputs give the same bytes: what PyTorch and cuBLAS have to be told for that, once a process."""

from __future__ import annotations

import os

import torch

from lrpq.errors import ConfigError

WORKSPACE_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACE = ":4096:8"
"""Of the two settings with which cuBLAS's products are deterministic, the one of 24 MiB: by PyTorch's documentation
the other, :16:8, may be slower."""


def compute_deterministically() -> None:
    """Have this process use deterministic algorithms alone, on GPUs too.

    cuBLAS reads its setting when a process first uses a GPU, so this comes before. Child processes inherit it. Memory
    that is not initialized is not filled, as PyTorch would do beside: nothing reads it.

    Raises:
        ConfigError: the process uses a GPU already, and cuBLAS was set otherwise.
    """
    found = os.environ.get(WORKSPACE_VARIABLE)
    if found != WORKSPACE and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise ConfigError(
            f"{WORKSPACE_VARIABLE} is {'not set' if found is None else found}, and a GPU is in use already: set it to "
            f"{WORKSPACE} before the process starts"
        )
    os.environ[WORKSPACE_VARIABLE] = WORKSPACE
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
