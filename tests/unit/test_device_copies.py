"""Copies and sums by several threads: the bits are those of one."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lrpq.model.staging import Staging
from tasks.device_copies import (
    added,
    copied_beside,
    copied_to_device,
    copied_to_host,
    to_device,
    to_host,
    to_host_beside,
)
from tasks.store.host_threads import set_host_threads

CPU = torch.device("cpu")
PIECE = 256


@pytest.fixture(autouse=True, params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    set_host_threads(request.param)
    yield request.param
    set_host_threads(1)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).mul_(100).to(dtype)


@pytest.mark.parametrize(
    "tensor",
    [
        random(37, 41),
        random(7),
        random(0, 3),
        random(33, 65, dtype=torch.bfloat16),
        random(129, dtype=torch.int8),
        random(40, 30).T,
    ],
    ids=["many pieces", "one", "none", "bfloat16", "int8", "transposed"],
)
def test_copies_there_and_back_have_all_bits(tensor: Tensor) -> None:
    staging = Staging(CPU, buffers=2, buffer_bytes=128)  # fewer than threads, smaller than a piece
    for found in (
        copied_to_host(tensor, staging, piece_bytes=PIECE),
        copied_to_device(tensor, staging, piece_bytes=PIECE),
    ):
        assert found.dtype is tensor.dtype
        assert torch.equal(found, tensor)
        assert not tensor.numel() or found.data_ptr() != tensor.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sums_have_the_bits_of_pytorchs(dtype: torch.dtype) -> None:
    left, right = random(61, 67, dtype=dtype), random(67, 61, dtype=dtype).T
    left.view(-1)[:4] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45], dtype=dtype)
    right[0, :4] = torch.tensor([1.0, -float("inf"), -0.0, 1e-45], dtype=dtype)
    before = left.clone()
    found = added(left, right, piece_bytes=PIECE)
    wanted = left + right
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found.nan_to_num(), wanted.nan_to_num())
    assert torch.equal(found.signbit(), wanted.signbit()) or bool(wanted.isnan().any())
    assert torch.equal(left.nan_to_num(), before.nan_to_num())  # in new memory


def test_what_is_in_host_memory_already_is_not_copied() -> None:
    tensor = random(5000, 500)
    assert to_host(tensor).data_ptr() == tensor.data_ptr()
    assert to_device(tensor, "cpu").data_ptr() == tensor.data_ptr()
    assert to_host_beside({"a": tensor}).result()["a"].data_ptr() == tensor.data_ptr()


def test_copies_beside_have_all_bits_under_their_names_and_hold_nothing() -> None:
    staging = Staging(CPU, buffers=2, buffer_bytes=128)
    wanted = {(i, "name"): random(i, 41) for i in range(9)} | {(9, "turned"): random(40, 30).T}
    tensors = {key: tensor.clone() for key, tensor in wanted.items()}
    held = [weakref.ref(tensor) for tensor in tensors.values()]
    coming = copied_beside(tensors, staging)
    del tensors
    found = coming.result()
    assert list(found) == list(wanted)
    for key, tensor in wanted.items():
        assert torch.equal(found[key], tensor)
    gc.collect()
    assert [reference() for reference in held] == [None] * len(held)


def test_a_copy_beside_that_fails_says_so() -> None:
    class Broken(Staging):
        def to_host(self, *arguments: object, **options: object) -> Tensor:
            raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        copied_beside({"a": random(3, 4)}, Broken(CPU)).result()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_copies_beside_are_of_what_the_gpu_had_computed_by_then() -> None:
    values = torch.zeros(4096, 4096, device="cuda")
    tensors = {}
    for i in range(4):
        for _ in range(20):
            values = values + 1
        tensors[i] = values if i % 2 else values.T
    coming = to_host_beside(tensors)
    for _ in range(50):
        values = values * 2  # goes on
    for i, found in coming.result().items():
        assert torch.equal(found, torch.full((4096, 4096), 20.0 * (i + 1)))
