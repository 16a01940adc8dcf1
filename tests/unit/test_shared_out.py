"""A worker's sums of a block leave a GPU in shares: the same as those of a CPU, one after the other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flows import stages
from lrpq.model.layers import LinearSpec
from lrpq.model.staging import Staging
from lrpq.quant.hessian import HessianSum
from lrpq.relevance.sweep import BlockSums
from lrpq.shards import Node
from tasks import profile_sums
from tasks.artifacts import StageFolder
from tasks.profile_job import ProfileJob
from tasks.profile_sums import BANDS, HESSIANS, OUTPUTS, Part, shared_out, sums_bytes
from tasks.streams import StreamJob
from tasks.worker import Place, WorkerState

BLOCK, WIDE, NARROW = 3, "mlp.down", "mlp.up"


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sums(seed: int) -> BlockSums:
    def hessian(width: int) -> HessianSum:
        xx = random(width, width, seed=seed + width)
        return HessianSum(xx=xx + xx.T, weight_sum=2.5, num_tokens=7, x=random(width, seed=seed))

    return BlockSums(
        hessians={WIDE: hessian(1100), NARROW: hessian(40)},
        curvature={"down": random(9, seed=seed).double()},
        traces={"down": random(3, seed=seed).double()},
        outputs={"down": [random(9, 9, seed=seed), random(5, 5, seed=seed)]},
        num_tokens=7,
        num_explained=7,
    )


def job() -> ProfileJob:
    stream = StreamJob(
        model="m",
        dtype="float32",
        store="s",
        windows="w",
        length=7,
        num_tokens=14,
        num_shards=2,
        micro_batch=1,
    )
    return ProfileJob(
        stream=stream,
        folder=StageFolder(run_id="r", stage="profile", key="0" * 64),
        relevance="fisher",
        floor=0.0,
        power=0.5,
        seed=0,
        cut=frozenset({(BLOCK, WIDE)}),
    )


def state(device: str) -> WorkerState:
    place = Place(index=0, num_workers=2, epoch=0)
    return WorkerState(device=device, threads=1, kept_bytes=1, place=place, host_threads=3)


def tensors(part: Part) -> dict[str, Tensor]:
    nodes, weights = part
    found: dict[str, Tensor] = {f"weights {shard} {site}": s for shard, of in weights.items() for site, s in of.items()}
    for node, of_node in nodes.items():
        for site, H in of_node.hessians.items():
            found[f"{node} {site}"] = H.xx
            if H.x is not None:
                found[f"{node} {site} x"] = H.x
        for name, chunks in of_node.outputs.items():
            found |= {f"{node} {name} {i}": chunk for i, chunk in enumerate(chunks)}
        found |= {f"{node} {name} c": c for name, c in of_node.curvature.items()}
        found |= {f"{node} {name} trace": trace for name, trace in of_node.traces.items()}
    return found


@dataclass
class Blocks:
    """Of a stream, what its sums' sizes depend on: a width a block."""

    widths: list[int]
    d_out: int

    @property
    def num_blocks(self) -> int:
        return len(self.widths)

    def block_specs(self, block: int) -> list[LinearSpec]:
        return [
            LinearSpec(
                name=f"{block}.{site}",
                block=block,
                d_in=self.widths[block],
                d_out=self.d_out,
                input_site=site,
                fused_group=site,
            )
            for site in ("a", "b")
        ]

    def sites(self, block: int) -> dict[str, list[LinearSpec]]:
        return {spec.input_site: [spec] for spec in self.block_specs(block)}


@pytest.mark.parametrize(
    ("device", "widths", "in_flight"),
    [("cpu", [64, 64], 2), ("cuda", [64, 64], 8), ("cuda", [64, 2048], 6), ("cuda", [8192, 64], 2)],
)
def test_more_small_blocks_may_wait_for_the_store(device: str, widths: list[int], in_flight: int) -> None:
    stream: Any = Blocks(widths, d_out=1024)
    assert sums_bytes(stream, 0) == 4 * (2 * widths[0] ** 2 + 2 * 1024**2)
    assert sums_bytes(Blocks([64], d_out=5000), 0) == 4 * (2 * 64**2 + 2 * 5000 * 4096)  # type: ignore[arg-type]
    assert stages.blocks_in_flight(stream, device=device) == in_flight


def test_shares_that_leave_beside_are_those_that_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    staging = Staging(torch.device("cpu"), buffers=2, buffer_bytes=4096)
    copied: list[int] = []

    def to_host(tensor: Tensor, after: object = None) -> Tensor:
        assert after == "whole"
        copied.append(tensor.numel())
        return staging.to_host(tensor, staging.now())

    nodes: dict[Node, BlockSums] = {(0, 0): sums(1), (0, 1): sums(2)}
    weights = {0: {WIDE: random(7, seed=3)}, 1: {WIDE: random(7, seed=4)}}
    waited = shared_out(state("cpu"), job(), BLOCK, nodes, weights)  # type: ignore[arg-type]
    monkeypatch.setattr(profile_sums, "now", lambda device: "whole")
    monkeypatch.setattr(profile_sums, "to_host", to_host)
    before = {node: replace(of) for node, of in nodes.items()}
    beside = shared_out(state("cuda"), job(), BLOCK, nodes, weights)  # type: ignore[arg-type]
    assert list(beside) == list(waited) == [BANDS, HESSIANS, OUTPUTS]
    for share, coming in beside.items():
        wanted, found = tensors(waited[share].result(0)), tensors(coming.result(10))
        assert list(found) == list(wanted)
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert nodes == before  # the caller's own
    triangle = 1100 * 1101 // 2
    assert sum(copied) > 2 * triangle  # packed: both nodes' bands, with the diagonal blocks of their strips
    assert sum(copied) < 2 * 1100 * 1100
