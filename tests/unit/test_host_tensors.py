"""Tensors that wait on the host: what is read is what was put last, in any order, and nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conftest import write_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrpq.model.host_copies import HostCopies
from lrpq.model.host_tensors import HostGroups, HostList, HostTensors
from lrpq.model.kept import KeptInputs
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.streaming import BlockStream
from lrpq.refine.products import SiteProducts, merge_products
from lrpq.refine.sweep import RefineSweep
from lrpq.relevance.composite import Relevance
from lrpq.relevance.rules import Pass
from lrpq.relevance.sweep import BlockSums, ProfileSweep, Shard, merge_block_sums
from lrpq.shards import Node, root, split
from tasks.streams import open_copies
from tasks.worker import Place, WorkerState

CPU = torch.device("cpu")
WINDOWS, LENGTH, SHARDS, LAYERS = 10, 6, 5, 2
TOKENS = torch.randint(128, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def copies() -> Iterator[HostCopies]:
    made = HostCopies(CPU)
    yield made
    made.close()


def value(number: int) -> Tensor:
    return torch.full((number % 5, 3), float(number))


@settings(max_examples=30, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["put", "read", "pop"]), st.integers(0, 4), st.integers(0, 99)), max_size=30
    )
)
def test_a_dictionary_by_another_way(steps: list[tuple[str, int, int]]) -> None:
    copies = HostCopies(CPU)
    found: HostTensors[int] = HostTensors(copies)
    expected: dict[int, Tensor] = {}
    for step, key, number in steps:
        if step == "put":
            found[key] = expected[key] = value(number)
        elif key not in expected:
            with pytest.raises(KeyError):
                found[key]
        else:
            read, wanted = (found.pop(key), expected.pop(key)) if step == "pop" else (found[key], expected[key])
            assert torch.equal(read, wanted)
            assert read.data_ptr() != wanted.data_ptr() or not wanted.numel()
        assert list(found) == list(expected)
    copies.close()


def test_lists_and_groups(copies: HostCopies) -> None:
    row = HostList([value(i) for i in range(1, 5)], copies)
    row[2] = value(7)
    assert [float(x[0, 0]) for x in row] == [1, 2, 7, 4]
    assert len(row) == 4
    with pytest.raises(IndexError):
        row[4]
    groups: HostGroups[int, str] = HostGroups(copies)
    groups[0] = {"a": value(1), "b": value(2)}
    groups[1] = {"a": value(3)}
    groups[0] = {"a": value(4)}
    assert {key: {name: float(x[0, 0]) for name, x in group.items()} for key, group in groups.items()} == {
        0: {"a": 4.0},
        1: {"a": 3.0},
    }
    assert list(groups.pop(0)) == ["a"]
    assert list(groups) == [1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return ModelSource(write_llama(tmp_path_factory.mktemp("low") / "llama", layers=LAYERS))


def profiled(source: ModelSource, low_memory: HostCopies | None) -> tuple[list[BlockSums], list[dict[int, Tensor]]]:
    stream = BlockStream(source, dtype=torch.float32, low_memory=low_memory is not None)
    shards = [
        Shard(index=i, first_window=r.start, tokens=TOKENS[r.start : r.stop])
        for i, r in enumerate(split(WINDOWS, SHARDS))
    ]
    sums, weights = [], []
    with KeptInputs(memory_bytes=1 << 30) as kept:
        sweep = ProfileSweep(
            stream,
            shards,
            num_shards=SHARDS,
            relevance=Relevance.BLEND,
            floor=0.03,
            power=0.5,
            seed=0,
            micro_batch=1,
            kept=kept,
            low_memory=low_memory,
        )
        sweep.embed()
        for block, module in stream.stream(range(LAYERS)):
            sweep.forward(block, module)
        sweep.seed_gradients()
        assert all(set(group) == {Pass.FISHER, Pass.LRP} for group in sweep.upstream.values())
        for block, module in stream.stream(range(LAYERS)[::-1]):
            nodes, found = sweep.backward(block, module)
            sums.append(root(nodes, SHARDS, merge_block_sums))
            weights.append({i: torch.cat(list(s.values.values())) for i, s in found.items()})
    return sums, weights


def test_a_profile_in_low_memory_is_the_same_to_the_bit(source: ModelSource, copies: HostCopies) -> None:
    (sums, weights), (plain, plain_weights) = profiled(source, copies), profiled(source, None)
    for ours, theirs in zip(sums, plain, strict=True):
        assert all(torch.equal(ours.hessians[site].xx, H.xx) for site, H in theirs.hessians.items())
        assert all(ours.hessians[site].weight_sum == H.weight_sum for site, H in theirs.hessians.items())
        assert all(torch.equal(ours.curvature[name], c) for name, c in theirs.curvature.items())
        assert all(
            torch.equal(a, b)
            for name, chunks in theirs.outputs.items()
            for a, b in zip(ours.outputs[name], chunks, strict=True)
        )
        assert (ours.num_tokens, ours.num_explained) == (theirs.num_tokens, theirs.num_explained)
    for ours_of, theirs_of in zip(weights, plain_weights, strict=True):
        assert all(torch.equal(ours_of[shard], s) for shard, s in theirs_of.items())


def refined(source: ModelSource, low_memory: HostCopies | None) -> tuple[list[SiteProducts], Tensor, Tensor]:
    stream = BlockStream(source, dtype=torch.float32, low_memory=low_memory is not None)
    shards = {i: TOKENS[r.start : r.stop] for i, r in enumerate(split(WINDOWS, SHARDS))}
    sweep = RefineSweep(stream, shards, num_shards=SHARDS, micro_batch=1, with_shift=True, low_memory=low_memory)
    sweep.embed()
    found = []
    for block, module in stream.stream(range(LAYERS)):
        quantized: dict[str, Tensor] = {}
        for site in stream.sites(block).values():
            nodes: dict[Node, SiteProducts] = sweep.products(block, module, site, None, quantized)
            found.append(root(nodes, SHARDS, merge_products))
            quantized |= {spec.name: stream.weight(spec).mul(8).round().div(8) for spec in site}
        sweep.advance(block, module, quantized)
    streams = [torch.cat([x for shard in shards for x in which[shard]]) for which in (sweep.original, sweep.quantized)]
    return found, streams[0], streams[1]


def test_a_refinement_in_low_memory_is_the_same_to_the_bit(source: ModelSource, copies: HostCopies) -> None:
    (found, *streams), (plain, *plain_streams) = refined(source, copies), refined(source, None)
    for ours, theirs in zip(found, plain, strict=True):
        assert torch.equal(ours.hessian.xx, theirs.hessian.xx)
        assert ours.hessian.weight_sum == theirs.hessian.weight_sum
        for a, b in ((ours.shift, theirs.shift), (ours.pull, theirs.pull)):
            assert (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
    assert all(torch.equal(a, b) for a, b in zip(streams, plain_streams, strict=True))
    assert not torch.equal(streams[0], streams[1])


def test_nothing_of_a_refinement_is_left_on_the_device_between_its_steps(source: ModelSource) -> None:
    """All that a sweep holds is on the host: hidden states, and what it knows inside a block."""
    copies = HostCopies(CPU)
    stream = BlockStream(source, dtype=torch.float32)
    sweep = RefineSweep(stream, {0: TOKENS}, num_shards=1, micro_batch=2, with_shift=True, low_memory=copies)
    sweep.embed()
    with stream.block(0) as module:
        for site in stream.sites(0).values():
            sweep.products(0, module, site, None, {})
            held = [*sweep.original.values(), *sweep.quantized.values()]
            assert all(isinstance(row, HostList) for row in held)
            known = [unit for units in sweep._known.values() for unit in units.values()]
            assert not any(isinstance(x, Tensor) for unit in known for x in vars(unit).values())
    copies.close()


def test_a_worker_opens_copies_in_low_memory_and_ends_them() -> None:
    place = Place(index=0, num_workers=1, epoch=0)
    state = WorkerState(device="cpu:0", threads=1, kept_bytes=0, place=place, low_memory=True)
    copies = open_copies(state)
    assert copies is not None
    assert torch.equal(copies.start(value(3)).result(), value(3))
    state.close_copies()
    with pytest.raises(RuntimeError, match="shutdown"):
        copies.start(value(3))
    again = open_copies(state)
    state.clear()  # as where a stage fails
    assert again is not None
    with pytest.raises(RuntimeError, match="shutdown"):
        again.start(value(3))
    for device, low_memory in (("cpu", True), ("cpu:0", False)):  # a CPU's memory is the host's
        assert (
            open_copies(WorkerState(device=device, threads=1, kept_bytes=0, place=place, low_memory=low_memory)) is None
        )
