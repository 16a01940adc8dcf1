"""What a process is told so that the same inputs give the same bytes."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from lrpq.determinism import WORKSPACE, WORKSPACE_VARIABLE, compute_deterministically
from lrpq.errors import ConfigError


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process without any of it, and the tests' own settings behind it."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    monkeypatch.setenv(WORKSPACE_VARIABLE, "")  # so that it is put back, whatever happens
    monkeypatch.delenv(WORKSPACE_VARIABLE)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


def put() -> None:
    """An operation that PyTorch refuses where algorithms have to be deterministic."""
    torch.zeros(4).put_(torch.tensor([1, 1]), torch.tensor([1.0, 2.0]))


def test_other_algorithms_are_refused() -> None:
    put()
    compute_deterministically()
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        put()
    assert not torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.parametrize("found", [None, ":16:8", WORKSPACE])
def test_cublas_is_told_before_a_gpu_is_used(monkeypatch: pytest.MonkeyPatch, found: str | None) -> None:
    if found is not None:
        monkeypatch.setenv(WORKSPACE_VARIABLE, found)
    compute_deterministically()
    assert os.environ[WORKSPACE_VARIABLE] == WORKSPACE


@pytest.mark.parametrize(("found", "named"), [(None, "is not set"), (":16:8", "is :16:8")])
def test_afterwards_it_is_too_late(monkeypatch: pytest.MonkeyPatch, found: str | None, named: str) -> None:
    if found is not None:
        monkeypatch.setenv(WORKSPACE_VARIABLE, found)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(ConfigError, match=f"{named}, and a GPU is in use already: set it to {WORKSPACE}"):
        compute_deterministically()
    assert not torch.are_deterministic_algorithms_enabled()
    assert os.environ.get(WORKSPACE_VARIABLE) == found


def test_what_was_set_before_the_process_started_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKSPACE_VARIABLE, WORKSPACE)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    compute_deterministically()
    assert torch.are_deterministic_algorithms_enabled()
