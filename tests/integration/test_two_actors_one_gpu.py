"""Two workers on one device store the bytes that one worker stores which has it to itself.

Profile, candidates and refinement run as in a compression, on a real Ray cluster, without Prefect. On a CPU the workers
have a thread each; of a GPU each reserves half, so that both are processes of one card. Slow, for three workers are
started; that buys the results of workers that share a card, the order in which their sums are merged, and that both
compute.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import ray
import torch
from pipeline_case import VOCABULARY, start_pool, write_model

from benchmarks.two_gpus.objects import compare
from benchmarks.two_gpus.stages import STAGES, Case, Done, run_stages
from lrpq.determinism import WORKSPACE, WORKSPACE_VARIABLE
from lrpq.model.layers import Choice
from lrpq.model.source import open_source
from lrpq.model.streaming import BlockStream
from lrpq.quant.grid import code_range
from tasks import hessian_bands
from tasks.cluster import Pool
from tasks.hessian_bands import FIRST, REST, SECOND
from tasks.profile_job import HESSIANS
from tasks.refine import read_refined
from tasks.resources import WorkerShape, worker_shape
from tasks.store.tensors import read_symmetric, read_tensors, symmetric_index
from tasks.upper_triangle import WHOLE
from tasks.worker import WorkerState

LAYERS, HIDDEN, FFN = 2, 256, 2048
WIDE = 1024  # inputs of a site whose Hessian is in two objects here: the down projection's
SITES = 4
"""Input sites of a block: of q, k and v; o; gate and up; down."""
WINDOWS, LENGTH, SHARDS = 18, 128, 6
"""Three shards a worker: a pair of the tree's lies on both."""
BITS, GROUP = (2, 3, 4), 64
NOT_NEAREST = 0.05
"""Share of a layer's codes that GPTQ rounds elsewhere, at least."""
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]
pytestmark = pytest.mark.slow
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test


@dataclass(frozen=True, kw_only=True)
class Where:
    """What a worker says of itself."""

    process: int
    device: str
    """Of a GPU its UUID, which is the card's own and does not depend on what a process may see."""
    num_devices: int
    """GPUs that the process sees."""
    deterministic: bool


def where(state: WorkerState) -> Where:
    cuda = state.device == "cuda"
    return Where(
        process=os.getpid(),
        device=str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid) if cuda else "cpu",
        num_devices=torch.cuda.device_count() if cuda else 0,
        deterministic=torch.are_deterministic_algorithms_enabled() and os.environ[WORKSPACE_VARIABLE] == WORKSPACE,
    )


@dataclass(frozen=True, kw_only=True)
class Ran:
    """The stages on one pool."""

    shape: WorkerShape
    workers: list[Where]
    done: Done


@contextmanager
def pool_of(workers: int, device: str) -> Iterator[Pool]:
    """Workers beside the session's, on the same Ray, of the shape that they have on a cluster of one GPU."""
    shape = worker_shape(
        device=device,
        requested=workers,
        threads=1,
        cluster_cpus=2.0,
        cluster_gpus=1.0,
        free_bytes=4 << 30,
    )
    # the session's workers may have reserved all cores; theirs are idle
    pool = Pool(replace(shape, num_cpus=0.0), device=device, threads=1)
    try:
        yield pool
    finally:
        for worker in list(pool.workers):
            pool._drop(worker, "the test is done")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("two-actors") / "llama", layers=LAYERS, hidden=HIDDEN, ffn=FFN)


@pytest.fixture(scope="module", params=DEVICES)
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model: Path
) -> tuple[Case, dict[int, Ran]]:
    """The case, and by the number of workers what became of it."""
    device: str = request.param
    start_pool(request)
    case = Case(
        name="two actors",
        model=model,
        tokens=torch.randint(VOCABULARY, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(0)),
        device=device,
        budget_bits=3.25,
        shards=SHARDS,
        group_sizes=(GROUP,),
        bits=BITS,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hessian_bands, "LEAST_WIDTH", WIDE)
        return case, {workers: ran(case, workers, tmp_path_factory) for workers in (1, 2)}


def ran(case: Case, workers: int, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    with pool_of(workers, case.device) as pool:
        places = pool.each(where)
        done = run_stages(case, pool, tmp_path_factory.mktemp(f"{case.device}-{workers}"))
        return Ran(shape=pool.shape, workers=places, done=done)


def test_both_workers_are_processes_of_one_device(runs: tuple[Case, dict[int, Ran]]) -> None:
    case, found = runs
    one, two = found[1], found[2]
    assert (len(one.workers), len(two.workers)) == (1, 2)
    assert len({worker.process for worker in (*one.workers, *two.workers)}) == 3
    assert len({worker.device for worker in two.workers}) == 1
    if case.device == "cuda":
        assert (one.shape.num_gpus, two.shape.num_gpus) == (1.0, 0.5)
        assert {worker.num_devices for worker in (*one.workers, *two.workers)} == {1}
    assert all(worker.deterministic for worker in (*one.workers, *two.workers))
    assert one.done.losses == two.done.losses == []


def test_both_workers_have_computed(runs: tuple[Case, dict[int, Ran]]) -> None:
    """Windows in the profile, sites among the candidates, layers in the refinement; nothing is done twice."""
    case, found = runs
    for name in STAGES:
        ledgers = found[2].done.stages[name].workers
        assert len(ledgers) == 2
        assert all(ledger.busy > 0 for ledger in ledgers)
        if case.device == "cuda":
            assert all(ledger.peak_bytes > 0 for ledger in ledgers)

    def calls(workers: int, stage: str, function: str) -> list[int]:
        ledgers = found[workers].done.stages[stage].workers
        return [int(ledger.calls.get(function, [0])[0]) for ledger in ledgers]

    assert calls(2, "profile", "backward") == [LAYERS, LAYERS]
    # who has no windows has no inputs to keep
    assert all(ledger.moved["kept inputs"] > 0 for ledger in found[2].done.stages["profile"].workers)
    assert calls(1, "candidates", "quantize_site") == [LAYERS * SITES]
    assert sum(calls(2, "candidates", "quantize_site")) == LAYERS * SITES
    assert min(calls(2, "candidates", "quantize_site")) > 0
    assert sum(calls(2, "refine", "quantize")) == sum(calls(1, "refine", "quantize"))
    assert min(calls(2, "refine", "quantize")) > 0


@pytest.mark.parametrize("stage", STAGES)
def test_they_store_the_bytes_of_one_worker(runs: tuple[Case, dict[int, Ran]], stage: str) -> None:
    _, found = runs
    compared = compare(found[1].done, found[2].done, stage)
    assert compared.objects >= LAYERS
    assert compared.num_bytes > 0
    assert compared.different == {}


def test_wide_hessians_are_in_two_objects_and_whole(runs: tuple[Case, dict[int, Ran]]) -> None:
    _, found = runs
    done = found[2].done
    for block in range(LAYERS):
        keys = [done.folders["profile"].block(kind, block, "parquet") for kind in (HESSIANS, REST)]
        first, rest = (symmetric_index(done.store, key) for key in keys)
        assert (first.bands["down"], rest.bands) == (FIRST, {"down": SECOND})
        assert [name for name, band in first.bands.items() if band == WHOLE] == ["gate_up", "o", "qkv"]
        H = read_symmetric(done.store, keys[0], "down", rest=keys[1:])[0]
        assert (H.diagonal() > 0).all()
        assert torch.linalg.eigvalsh(H.double()).min() > -1e-5 * H.diagonal().max()


def test_the_codes_are_not_the_nearest_ones(runs: tuple[Case, dict[int, Ran]]) -> None:
    """Of their own scales: rounding makes up for errors, so the Hessians, and with them the sums, do matter."""
    case, found = runs
    done = found[2].done
    source = open_source(case.model)
    for spec in BlockStream(source, dtype=torch.bfloat16).specs:
        stored = read_tensors(done.store, done.folders["refine"].module(spec.name))
        bits = stored["weight_packed"].shape[1] * 32 // spec.d_in
        quantized = read_refined(done.store, done.folders["refine"], spec.name, Choice(bits=bits, group_size=GROUP))
        assert bits in BITS
        weight = source.read(*spec.stored).float().view(spec.d_out, -1, GROUP)
        nearest = (weight / quantized.scales.float()[..., None]).round().clamp(*code_range(bits))
        moved = (quantized.codes != nearest.view_as(quantized.codes)).double().mean()
        assert moved > NOT_NEAREST, spec.name
