"""Where an interrupted profile goes on: a block counts as stored when all of its objects are there."""

from __future__ import annotations

from pathlib import Path

import pytest

from lrpq.model.layers import LinearSpec
from tasks import hessian_bands, profile_job, profile_sums
from tasks.artifacts import StageFolder
from tasks.hessian_bands import REST, wide_sites
from tasks.profile import position
from tasks.profile_job import HESSIANS, ProfileJob
from tasks.profile_sums import BANDS, OUTPUTS
from tasks.store.opened import open_store
from tasks.streams import StreamJob

BLOCKS = 3


def layer(site: str, *, block: int, d_in: int, routed: bool = False) -> LinearSpec:
    name = f"{block}.{site}"
    return LinearSpec(name=name, block=block, input_site=site, d_out=8, d_in=d_in, fused_group=name, routed=routed)


def job_of(tmp_path: Path, cut: frozenset[tuple[int, str]], *, gradients_every: int = 1) -> ProfileJob:
    stream = StreamJob(
        model="unused",
        dtype="float32",
        store=str(tmp_path / "store"),
        windows="unused",
        length=8,
        num_tokens=16,
        num_shards=1,
        micro_batch=1,
    )
    return ProfileJob(
        stream=stream,
        folder=StageFolder(run_id="run", stage=profile_job.STAGE, key="0" * 64),
        relevance="fisher",
        floor=0.0,
        power=1.0,
        seed=0,
        gradients_every=gradients_every,
        cut=cut,
    )


def test_a_block_of_which_a_band_is_missing_is_not_stored(tmp_path: Path) -> None:
    job = job_of(tmp_path, frozenset({(1, "down"), (2, "down")}))
    store = open_store(job.stream.store)
    for block in range(BLOCKS):
        for kind, ending in job.block_objects(block):
            store.publish(job.folder.block(kind, block, ending), lambda file: None)
    assert position(job, num_blocks=BLOCKS).stored == {0, 1, 2}
    store.delete(job.folder.block(REST, 1, "parquet"))
    assert position(job, num_blocks=BLOCKS).stored == {0, 2}


def test_only_blocks_with_wide_sites_have_a_second_object(tmp_path: Path) -> None:
    job = job_of(tmp_path, frozenset({(1, "down")}))
    assert [REST in dict(job.block_objects(block)) for block in range(BLOCKS)] == [False, True, False]
    assert [profile_sums.shares(job, block) for block in (0, 1)] == [(HESSIANS, OUTPUTS), (BANDS, HESSIANS, OUTPUTS)]
    assert profile_sums.storing_workers(job, 1, 2) == {BANDS: 1, HESSIANS: 0, OUTPUTS: 1}
    plain = job_of(tmp_path, job.cut, gradients_every=8)  # plain Hessians are stored on the way forward, whole
    assert not any(REST in dict(plain.block_objects(block)) for block in range(BLOCKS))


def test_wide_sites_are_cut_but_those_of_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian_bands, "LEAST_WIDTH", 64)
    specs = [
        layer("qkv", block=0, d_in=32),
        layer("down", block=0, d_in=64),
        layer("experts.0.down", block=1, d_in=64, routed=True),
        layer("down", block=1, d_in=128),
    ]
    assert wide_sites(specs) == {(0, "down"), (1, "down")}
