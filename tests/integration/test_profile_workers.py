"""A profile whose widest Hessians are in two objects: by one, two and three workers, interrupted, and read again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_llama

from benchmarks.two_gpus.objects import compare
from benchmarks.two_gpus.stages import Case, Done, run_stages
from lrpq.errors import StoreError
from tasks import hessian_bands
from tasks.hessian_bands import REST
from tasks.profile_job import HESSIANS
from tasks.store.tensors import read_symmetric, symmetric_index
from tasks.worker import Place, WorkerState

LAYERS, HIDDEN, FFN, VOCABULARY = 2, 64, 1600, 128
WIDE = 1024
"""Inputs of a site whose Hessian is cut here: the down projection's, whose last strip is none of 512 rows."""
SHARDS = 6
"""The tree's pairs lie on both sides of two workers' border, and one worker is left with two roots."""
SITES = {"qkv", "o", "gate_up", "down"}


@dataclass
class Workers:
    """Some workers, all of them this process: a call is over when it is asked for."""

    count: int
    states: list[WorkerState] = field(init=False)
    losses: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        places = [Place(index=i, num_workers=self.count, epoch=0) for i in range(self.count)]
        self.states = [WorkerState(device="cpu", threads=1, kept_bytes=1 << 30, place=place) for place in places]

    def __len__(self) -> int:
        return self.count

    def submit(self, worker: int, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(self.states[worker], *arguments)

    submit_beside = submit_passing = submit

    def each(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        return [function(state, *arguments) for state in self.states]

    each_refs = each

    def get(self, references: list[Any]) -> list[Any]:
        return list(references)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("profile-workers") / "llama"
    return Case(
        name="workers",
        model=write_llama(folder, layers=LAYERS, hidden=HIDDEN, ffn=FFN, vocabulary=VOCABULARY),
        tokens=torch.randint(VOCABULARY, (12, 16), generator=torch.Generator().manual_seed(0)),
        device="cpu",
        budget_bits=3.25,
        shards=SHARDS,
        stages=("profile",),
    )


def profiled(case: Case, folder: Path, workers: int, *, wide: int = WIDE) -> Done:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hessian_bands, "LEAST_WIDTH", wide)
            return run_stages(case, Workers(workers), folder)  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def alone(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Done:
    return profiled(case, tmp_path_factory.mktemp("alone"), 1)


def keys_of(done: Done, block: int) -> list[str]:
    return [done.folders["profile"].block(kind, block, "parquet") for kind in (HESSIANS, REST)]


@pytest.mark.parametrize("workers", [2, 3, 7])
def test_any_number_of_workers_stores_the_same_bytes(case: Case, alone: Done, tmp_path: Path, workers: int) -> None:
    """Seven: one of them has no shard."""
    found = compare(alone, profiled(case, tmp_path, workers), "profile")
    assert found.different == {}
    assert found.objects == 6 * LAYERS


def test_what_is_read_of_two_objects_is_what_one_would_hold(case: Case, alone: Done, tmp_path: Path) -> None:
    whole = profiled(case, tmp_path, 2, wide=FFN + 1)
    for block in range(LAYERS):
        first, rest = keys_of(alone, block)
        assert set(symmetric_index(alone.store, first).widths) == SITES
        assert set(symmetric_index(alone.store, rest).widths) == {"down"}
        one, none = keys_of(whole, block)
        assert not whole.store.exists(none)
        wanted, scalars = read_symmetric(whole.store, one, "down")
        found, numbers = read_symmetric(alone.store, first, "down", rest=[rest])
        assert (wanted.diagonal() > 0).all()
        assert torch.equal(found, wanted)
        assert numbers == scalars
        for site in SITES - {"down"}:
            assert torch.equal(read_symmetric(alone.store, first, site)[0], read_symmetric(whole.store, one, site)[0])
        with pytest.raises(StoreError, match="places 3, 4 of 5 are in none of those that were read"):
            read_symmetric(alone.store, first, "down")


@pytest.mark.parametrize("kind", [HESSIANS, REST])
def test_a_block_that_lacks_one_of_its_objects_is_made_again(
    case: Case, alone: Done, tmp_path: Path, kind: str
) -> None:
    done = profiled(case, tmp_path, 2)
    gone = done.folders["profile"].block(kind, 0, "parquet")
    done.store.delete(gone)
    with pytest.raises(StoreError, match=f"no object {gone}"):
        read_symmetric(done.store, keys_of(done, 0)[0], "down", rest=keys_of(done, 0)[1:])
    again = profiled(case, tmp_path, 1)
    assert again.store.exists(gone)
    assert compare(alone, again, "profile").different == {}
