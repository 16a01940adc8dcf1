"""What a worker sends is what another one gets, bit for bit, and its bytes are not copied into the pickle."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor

from tasks.tensor_transport import received, sent

pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")  # so do workers


def passed_on(tensor: Tensor) -> tuple[Tensor, bytes, list[pickle.PickleBuffer]]:
    """A tensor through pickle as Ray uses it: buffers beside the stream, read-only where they arrive."""
    buffers: list[pickle.PickleBuffer] = []
    stream = pickle.dumps(sent(tensor), protocol=5, buffer_callback=buffers.append)
    arrived = [memoryview(bytes(buffer.raw())) for buffer in buffers]
    return received(pickle.loads(stream, buffers=arrived)), stream, buffers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.int64, torch.bool])
def test_every_dtype_arrives_with_its_bits(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = (torch.randn(5, 3, generator=generator) * 50).to(dtype)
    found, _, _ = passed_on(tensor)
    assert found.dtype is dtype
    assert torch.equal(found, tensor)


def test_values_that_equal_nothing_arrive_with_their_bits() -> None:
    tensor = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45])
    found, _, _ = passed_on(tensor)
    assert torch.equal(found.view(torch.int32), tensor.view(torch.int32))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).reshape(3, 4).T,
        torch.arange(12.0)[2:9:3],
        torch.tensor(2.5),
        torch.zeros(0, 7),
        torch.arange(3.0).expand(2, 3),
        torch.ones(2, requires_grad=True),
    ],
    ids=["transposed", "strided", "scalar", "empty", "expanded", "with gradient"],
)
def test_every_layout_arrives(tensor: Tensor) -> None:
    found, _, _ = passed_on(tensor)
    assert found.shape == tensor.shape
    assert torch.equal(found, tensor)


def test_bytes_travel_beside_the_pickle_and_are_those_of_the_tensor() -> None:
    tensor = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
    _, stream, buffers = passed_on(tensor)
    assert len(stream) < 1000
    tensor[0] = 7.0  # seen through the buffer: it is the tensor's own memory
    assert torch.frombuffer(bytearray(buffers[0].raw()), dtype=torch.float32)[0] == 7.0
