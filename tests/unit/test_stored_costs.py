"""Costs from what a profile stores: folded inputs do not change what an error costs, and traces come back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from torch import Tensor

from lrpq.activations.folding import folding_of
from lrpq.activations.grids import UniformGrid
from lrpq.model.layers import Choice, LinearSpec
from lrpq.quant.gptq import predicted_cost
from lrpq.quant.hessian import HessianSum
from lrpq.quant.matched_curvature import MOST
from lrpq.quant.rtn import round_to_nearest
from lrpq.relevance.sweep import BlockSums, add_block_sums, merge_block_sums
from tasks import candidates, profile, profile_reads
from tasks.artifacts import StageFolder
from tasks.profile_job import INPUTS, ProfileJob
from tasks.profile_reads import read_curvature
from tasks.profile_sums import _write_curvature, write_hessians
from tasks.store.opened import open_store
from tasks.store.tensors import write_tensors
from tasks.streams import StreamJob

if TYPE_CHECKING:
    from tasks.candidates import CandidatesJob
    from tasks.worker import WorkerState

SITE, WIDTH = "qkv", 48
CHOICE = Choice(bits=4, group_size=-1)
SPEC = LinearSpec(name="0.q", block=0, d_out=16, d_in=WIDTH, input_site=SITE, fused_group="0.qkv")


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def profiled(store: Path, outlier: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> ProfileJob:
    """A profile of one site with the sums of 200 tokens in 4 windows, inputs of very different sizes.

    Args:
        outlier: factors of the windows' traces.
    """
    stream = StreamJob(
        model="m",
        dtype="float32",
        store=str(store),
        windows="w",
        length=200,
        num_tokens=200,
        num_shards=1,
        micro_batch=1,
    )
    job = ProfileJob(
        stream=stream,
        folder=StageFolder(run_id="r", stage="profile", key="0" * 64),
        relevance="fisher",
        floor=0.0,
        power=0.5,
        seed=0,
        cut={},
    )
    x = normal(200, WIDTH, seed=0) * normal(WIDTH, seed=1).exp()
    g = normal(200, 16, seed=2) / x.norm(dim=1, keepdim=True)
    squares = g.double().square()
    sums = BlockSums(
        hessians={SITE: HessianSum(xx=(x.T @ x).triu(), weight_sum=200.0, num_tokens=200, x=x.double().sum(0))},
        curvature={SPEC.name: squares.sum(0)},
        traces={
            SPEC.name: (squares.sum(1) * x.double().square().sum(1)).view(4, -1).sum(1) * torch.tensor(outlier).double()
        },
        outputs={},
        num_tokens=200,
        num_explained=200,
    )
    opened = open_store(str(store))
    write_hessians(opened, job, 0, {(0, 0): sums})
    write_tensors(opened, job.folder.block(INPUTS, 0, "safetensors"), {SITE: x.double().sum(0)}, {})
    _write_curvature(opened, job, 0, sums)
    return job


def problem_of(job: ProfileJob) -> tuple[HessianSum, Tensor, Tensor]:
    """The site's sums, H and c, as the candidates' stage has them."""
    asking = cast("CandidatesJob", SimpleNamespace(profile=job, damping=0.01, choices=(CHOICE,), head=None))
    sums = candidates.site_sums(asking, 0, SITE, SPEC)
    problem = candidates.site_problem(cast("WorkerState", SimpleNamespace(device="cpu")), asking, sums, (SPEC,))
    return sums.hessian, problem.H, read_curvature(job, 0, [SPEC.name], problem.trace)[SPEC.name]


def test_an_error_costs_the_same_in_a_folded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W' = W diag(r) and its error dW diag(r), under the folded H, with inputs of other sizes and shifted."""
    job = profiled(tmp_path)
    W = normal(16, WIDTH, seed=3)
    rounded = round_to_nearest(W, CHOICE)
    _, plain, c = problem_of(job)
    wanted = predicted_cost(W, [rounded], plain, c)[0]
    channels = UniformGrid(bits=8, scale=0.05 * normal(WIDTH, seed=4).exp(), offset=normal(WIDTH, seed=5))
    folding = folding_of(channels)
    monkeypatch.setattr(profile_reads, "folding_at", lambda *_: folding)
    folded = replace(job, stream=replace(job.stream, activations=cast("Any", object())))
    # dW diag(r) of the folded weights: rounded rows of any numbers
    error = (rounded.dequantize(torch.float64) - W.double()) * folding.ratio
    sums, H, c = problem_of(folded)
    assert sums.x is not None
    # shifts add a constant to the inputs, which a bias makes good: what is left of H is its spread and its mean
    shifted = folding.affine[1]
    mean = sums.x / sums.weight_sum
    unshifted = H.double() - torch.outer(mean, mean) + torch.outer(mean - shifted, mean - shifted)
    found = 0.5 * float((c * ((error @ unshifted) * error).sum(1)).sum())
    assert found == pytest.approx(wanted, rel=1e-3)


def test_the_trace_is_stored_beside_the_curvature(tmp_path: Path) -> None:
    job = profiled(tmp_path)
    x = normal(200, WIDTH, seed=0) * normal(WIDTH, seed=1).exp()
    g = normal(200, 16, seed=2) / x.norm(dim=1, keepdim=True)
    H_trace = float(x.double().square().sum() / 200)
    c = read_curvature(job, 0, [SPEC.name], H_trace)[SPEC.name]
    trace = float((g.double().square().sum(1) * x.double().square().sum(1)).mean())
    assert float(c.sum()) * H_trace == pytest.approx(trace, rel=1e-6)
    assert profile.stored_curvature(job, [0]) == {SPEC.name: pytest.approx(float(g.double().square().sum() / 200))}


def test_a_window_that_would_be_all_of_the_trace_is_bounded(tmp_path: Path) -> None:
    job = profiled(tmp_path, outlier=(1.0, 1e5, 1.0, 1.0))
    x = normal(200, WIDTH, seed=0) * normal(WIDTH, seed=1).exp()
    g = normal(200, 16, seed=2) / x.norm(dim=1, keepdim=True)
    windows = (g.double().square().sum(1) * x.double().square().sum(1)).view(4, -1).sum(1)
    others = windows[torch.tensor([0, 2, 3])]
    c = read_curvature(job, 0, [SPEC.name], 1.0)[SPEC.name]
    bound = sum(sorted(others.tolist())) + MOST * sorted([*others.tolist(), 1e5 * float(windows[1])])[1]
    assert float(c.sum()) == pytest.approx(bound / 200, rel=1e-6)


def test_a_number_for_all_windows_stays(tmp_path: Path) -> None:
    """Of an expert, of images, of the head: sums of shards add up, and nothing is bounded."""
    job = profiled(tmp_path)
    job = replace(job, folder=replace(job.folder, key="1" * 64))
    store = open_store(str(job.stream.store))
    one = BlockSums(
        hessians={},
        curvature={SPEC.name: torch.ones(16, dtype=torch.float64)},
        traces={SPEC.name: torch.tensor(1.0, dtype=torch.float64)},
        outputs={},
        num_tokens=100,
        num_explained=100,
    )
    far = replace(one, traces={SPEC.name: torch.tensor(1e6, dtype=torch.float64)})
    both = merge_block_sums(one, far)
    assert float(add_block_sums(one, far).traces[SPEC.name]) == float(both.traces[SPEC.name]) == 1 + 1e6
    _write_curvature(store, job, 0, both)
    assert float(read_curvature(job, 0, [SPEC.name], 1.0)[SPEC.name].sum()) == pytest.approx((1 + 1e6) / 200)
