"""What of a block's sums each worker merges and stores: whatever their number, no one has much more than its part."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lrpq.model.layers import LinearSpec
from lrpq.quant.hessian import HessianSum
from lrpq.refine.routed import POOLED
from lrpq.relevance.outputs import CHUNK_ROWS
from lrpq.relevance.sweep import BlockSums
from tasks.artifacts import StageFolder
from tasks.hessian_bands import FIRST, SECOND, wide_sites
from tasks.profile_job import HESSIANS, ProfileJob
from tasks.profile_sums import BANDS, OUTPUTS, storing_workers, write_hessians
from tasks.store.opened import open_store
from tasks.store.symmetric import read_symmetric
from tasks.streams import StreamJob
from tasks.upper_triangle import STRIP, WHOLE, _numel, packed


def layers(block: int, *, hidden: int, key_value: int, ffn: int) -> list[LinearSpec]:
    """Of a Llama's block."""
    shapes = {
        "q": ("qkv", hidden, hidden),
        "k": ("qkv", key_value, hidden),
        "v": ("qkv", key_value, hidden),
        "o": ("o", hidden, hidden),
        "gate": ("gate_up", ffn, hidden),
        "up": ("gate_up", ffn, hidden),
        "down": ("down", hidden, ffn),
    }
    return [
        LinearSpec(name=f"{block}.{name}", block=block, d_out=d_out, d_in=d_in, input_site=site, fused_group=name)
        for name, (site, d_out, d_in) in shapes.items()
    ]


def job(specs: list[LinearSpec]) -> ProfileJob:
    stream = StreamJob(
        model="m", dtype="bfloat16", store="s", windows="w", length=8, num_tokens=64, num_shards=8, micro_batch=1
    )
    return ProfileJob(
        stream=stream,
        folder=StageFolder(run_id="r", stage="profile", key="0" * 64),
        relevance="fisher",
        floor=0.0,
        power=0.5,
        seed=0,
        cut=wide_sites(specs),
    )


def share_values(job: ProfileJob, specs: list[LinearSpec]) -> dict[str, int]:
    """Share -> values of its matrices as they travel."""
    widths = {spec.input_site: spec.d_in for spec in specs}
    cut = job.cut_of(0)
    first = sum(_numel(width, FIRST if site in cut else WHOLE) for site, width in widths.items())
    second = sum(_numel(widths[site], SECOND) for site in cut)
    chunks = [min(CHUNK_ROWS, s.d_out - start) for s in specs for start in range(0, s.d_out, CHUNK_ROWS)]
    return {HESSIANS: first, BANDS: second, OUTPUTS: sum(map(_numel, chunks))}


@pytest.mark.parametrize(
    ("shape", "most"),
    [
        ({"hidden": 8192, "key_value": 1024, "ffn": 28672}, 0.502),
        ({"hidden": 16384, "key_value": 1024, "ffn": 53248}, 0.504),
        ({"hidden": 5120, "key_value": 1024, "ffn": 25600}, 0.54),
    ],
    ids=["70B", "405B", "32B"],
)
def test_two_workers_have_about_half_of_a_block_s_sums_each(shape: dict[str, int], most: float) -> None:
    specs = layers(0, **shape)
    sizes = share_values(job(specs), specs)
    for block in (0, 1):
        of_worker = [0, 0]
        cut = replace(job(specs), cut=frozenset((block, site) for _, site in wide_sites(specs)))
        for share, worker in storing_workers(cut, block, 2).items():
            of_worker[worker] += sizes[share]
        assert sum(of_worker) == sum(sizes.values())
        assert max(of_worker) < most * sum(of_worker)


def test_three_fifths_of_a_wide_site_are_in_first_bands() -> None:
    for width in (16384, 25600, 28672, 28673, 53248):
        first, second = _numel(width, FIRST), _numel(width, SECOND)
        assert first + second == _numel(width)
        assert abs(first - 0.6 * _numel(width)) < STRIP * width


def test_three_workers_store_a_share_each_in_turns() -> None:
    specs = [spec for block in range(3) for spec in layers(block, hidden=8192, key_value=1024, ffn=28672)]
    turns = [storing_workers(job(specs), block, 3) for block in range(3)]
    assert all(sorted(turn.values()) == [0, 1, 2] for turn in turns)
    for share in (HESSIANS, BANDS, OUTPUTS):
        assert sorted(turn[share] for turn in turns) == [0, 1, 2]


def test_what_workers_have_is_added_up_in_the_fixed_tree_and_experts_together(tmp_path: Path) -> None:
    """As packed triangles of three workers, several strips each, against squares added one after the other."""
    sites = ("experts.0.gate_up", "experts.1.gate_up", "experts.2.gate_up", "qkv")
    generator = torch.Generator().manual_seed(0)
    xx = {(0, i): {site: torch.randn(1100, 1100, generator=generator) for site in sites} for i in range(3)}
    nodes = {
        node: BlockSums(
            hessians={s: HessianSum(xx=packed(m), weight_sum=0.5, num_tokens=7) for s, m in found.items()},
            curvature={},
            traces={},
            outputs={},
            num_tokens=9,
            num_explained=9,
        )
        for node, found in xx.items()
    }
    one = replace(job([]), stream=replace(job([]).stream, num_shards=3))
    store = open_store(str(tmp_path))
    merged = write_hessians(store, one, 0, nodes)
    assert merged.num_tokens == 27
    sums = {site: (xx[0, 0][site] + xx[0, 1][site]) + xx[0, 2][site] for site in sites}
    sums[POOLED] = (sums[sites[0]] + sums[sites[1]]) + sums[sites[2]]
    for site, matrix in sums.items():
        found, scalars = read_symmetric(store, one.folder.block(HESSIANS, 0, "parquet"), site, lower=False)
        assert torch.equal(found, matrix.triu())
        experts = 3 if site == POOLED else 1
        assert scalars == {"weight_sum": experts * 1.5, "num_tokens": experts * 21, "total": 27}
