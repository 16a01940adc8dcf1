"""What a worker reserves: never more than the cluster has, whatever is asked for."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.resources import WorkerShape, cut_of, shards_of, windows_at_once, worker_shape, workers_that_fit

GIB = 1 << 30


def shape(**changes: Any) -> WorkerShape:
    asked = {"device": "cpu", "requested": None, "threads": 1, "cluster_cpus": 8.0, "cluster_gpus": 0.0}
    return worker_shape(**{**asked, "free_bytes": 64 * GIB, **changes})


@pytest.mark.parametrize(
    ("changes", "workers", "cpus", "gpus"),
    [
        ({}, 8, 1.0, 0.0),
        ({"threads": 4}, 2, 4.0, 0.0),
        ({"threads": 3}, 2, 3.0, 0.0),
        ({"threads": 16}, 1, 8.0, 0.0),  # one worker at least, with what there is
        ({"requested": 3}, 3, 1.0, 0.0),
        ({"requested": 16}, 16, 0.5, 0.0),  # more workers than cores share them
        ({"cluster_gpus": 4.0}, 8, 1.0, 0.0),  # GPUs are left alone on device cpu
        ({"device": "cuda", "cluster_gpus": 4.0}, 4, 1.0, 1.0),
        ({"device": "cuda", "cluster_gpus": 4.0, "requested": 2}, 2, 1.0, 1.0),
        ({"device": "cuda", "cluster_gpus": 1.0, "requested": 2}, 2, 1.0, 0.5),
        ({"device": "cuda", "cluster_gpus": 4.0, "threads": 8}, 4, 2.0, 1.0),
    ],
)
def test_shape(changes: dict[str, Any], workers: int, cpus: float, gpus: float) -> None:
    found = shape(**changes)
    assert (found.num_workers, found.num_cpus, found.num_gpus) == (workers, cpus, gpus)


@pytest.mark.parametrize(
    ("changes", "threads"),
    [
        ({}, 1),
        ({"threads": 4}, 1),  # a CPU's worker computes on its cores
        ({"device": "cuda", "cluster_gpus": 1.0}, 8),
        ({"device": "cuda", "cluster_gpus": 2.0}, 4),
        ({"device": "cuda", "cluster_gpus": 2.0, "requested": 1}, 4),  # the other GPU's cores are left alone
        ({"device": "cuda", "cluster_gpus": 2.0, "requested": 4}, 2),
        ({"device": "cuda", "cluster_gpus": 2.0, "cluster_cpus": 64.0}, 12),
        ({"device": "cuda", "cluster_gpus": 8.0, "cluster_cpus": 4.0}, 1),
    ],
)
def test_a_gpus_worker_moves_bytes_with_its_share_of_the_cores(changes: dict[str, Any], threads: int) -> None:
    assert shape(**changes).host_threads == threads


@pytest.mark.parametrize(
    ("changes", "workers"),
    [
        ({}, 0),
        ({"device": "cuda", "cluster_gpus": 4.0}, 1),
        ({"device": "cuda", "cluster_gpus": 1.0, "requested": 2}, 2),
        ({"device": "cuda", "cluster_gpus": 2.0, "requested": 3}, 2),  # one has a card to itself
        ({"device": "cuda", "cluster_gpus": 1.0, "requested": 49}, 49),  # 49 * (1 / 49) < 1
    ],
)
def test_workers_that_share_a_gpu(changes: dict[str, Any], workers: int) -> None:
    assert shape(**changes).workers_a_gpu == workers


@given(
    device=st.sampled_from(["cpu", "cuda"]),
    requested=st.none() | st.integers(1, 64),
    threads=st.integers(1, 64),
    cpus=st.integers(1, 256),
    gpus=st.integers(1, 16),
    free_bytes=st.integers(4 * GIB, 2048 * GIB),
)
def test_all_workers_fit_on_the_cluster(
    device: str, requested: int | None, threads: int, cpus: int, gpus: int, free_bytes: int
) -> None:
    found = shape(
        device=device,
        requested=requested,
        threads=threads,
        cluster_cpus=float(cpus),
        cluster_gpus=float(gpus),
        free_bytes=free_bytes,
    )
    assert found.num_workers >= 1
    assert requested is None or found.num_workers == requested
    assert found.num_cpus > 0
    assert found.num_workers * found.num_cpus <= cpus * (1 + 1e-9)
    assert found.num_workers * found.num_gpus <= gpus * (1 + 1e-9)
    assert (found.num_gpus > 0) == (device == "cuda")
    # Kept inputs take a quarter of the free memory at most, apart from the least that is useful.
    assert found.num_workers * found.kept_bytes <= max(free_bytes // 4, found.num_workers << 28)


@pytest.mark.parametrize(
    ("asked", "cpus", "gpus", "fitting"),
    [
        ({}, 8.0, 0.0, 8),
        ({}, 4.0, 0.0, 4),  # half of the machines are gone
        ({"threads": 4}, 7.0, 0.0, 1),
        ({"requested": 24}, 8.0, 0.0, 24),  # shares of a third add up
        ({"requested": 24}, 4.0, 0.0, 12),
        ({"device": "cuda", "cluster_gpus": 4.0}, 8.0, 3.0, 3),
        ({"device": "cuda", "cluster_gpus": 4.0}, 1.0, 4.0, 1),
        ({}, 0.0, 0.0, 0),
    ],
)
def test_workers_that_fit_into_what_is_left(asked: dict[str, Any], cpus: float, gpus: float, fitting: int) -> None:
    assert workers_that_fit(shape(**asked), cluster_cpus=cpus, cluster_gpus=gpus) == fitting


@pytest.mark.parametrize(
    ("asked", "device", "length", "hidden", "windows"),
    [
        (None, "cpu", 2048, 8192, 4),
        (None, "cuda", 1024, 576, 64),
        (None, "cuda", 1024, 2048, 32),
        (None, "cuda", 2048, 4096, 8),
        (None, "cuda", 2048, 8192, 4),
        (None, "cuda", 8192, 16384, 1),
        (3, "cuda", 1024, 576, 3),
        (3, "cpu", 1024, 576, 3),
    ],
)
def test_windows_at_once(asked: int | None, device: str, length: int, hidden: int, windows: int) -> None:
    assert windows_at_once(asked, device=device, length=length, hidden=hidden) == windows


@pytest.mark.parametrize(
    ("asked", "device", "num_windows", "length", "hidden", "shards"),
    [
        (None, "cpu", 128, 1024, 576, 8),
        (None, "cpu", 3, 1024, 576, 3),
        (None, "cuda", 128, 1024, 576, 2),  # 64 windows at once
        (None, "cuda", 128, 1024, 1536, 4),  # 42: no shard has more
        (None, "cuda", 128, 2048, 1536, 7),
        (None, "cuda", 1024, 1024, 576, 8),
        (None, "cuda", 16, 1024, 576, 2),
        (None, "cuda", 1, 1024, 576, 1),
        (None, "cuda", 64, 512, 4096, 8),  # wide: 32 windows at once, and work enough for eight workers
        (None, "cuda", 128, 2048, 8192, 8),
        (16, "cuda", 128, 1024, 576, 16),
        (16, "cpu", 12, 1024, 576, 12),
    ],
)
def test_shards(asked: int | None, device: str, num_windows: int, length: int, hidden: int, shards: int) -> None:
    micro_batch = windows_at_once(None, device=device, length=length, hidden=hidden)
    found = shards_of(asked, device=device, num_windows=num_windows, length=length, micro_batch=micro_batch)
    assert found == shards
    if asked is None:
        cut = cut_of(device=device, num_windows=num_windows, length=length, hidden=hidden)
        assert (cut.shards, cut.micro_batch) == (shards, micro_batch)
