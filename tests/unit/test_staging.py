"""Copies through a ring of buffers: the bits arrive whatever their number, nobody holds more buffers than there are."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import write_llama
from torch import Tensor

import lrpq.model.host_copies
from lrpq.errors import ModelError
from lrpq.model.file_reads import FileReads
from lrpq.model.host_copies import HostCopies
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.staging import Staging
from lrpq.model.streaming import BlockStream

CPU = torch.device("cpu")
BUFFER_BYTES = 64


def random(numel: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(numel)
    return torch.randn(numel, generator=generator).mul_(100).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8, torch.int64])
@pytest.mark.parametrize("numel", [0, 1, 31, 32, 33, 1000])
def test_pieces_make_up_the_tensor(numel: int, dtype: torch.dtype) -> None:
    staging = Staging(CPU, buffers=2, buffer_bytes=BUFFER_BYTES)
    tensor = random(numel, dtype)
    copy = staging.to_host(tensor, staging.now())
    into = torch.zeros(numel, dtype=dtype)
    staging.wait(staging.to_device(copy, into, staging.now()))
    assert torch.equal(copy, tensor)
    assert torch.equal(into, tensor)
    assert not numel or copy.data_ptr() != tensor.data_ptr()


def test_a_shape_is_kept() -> None:
    staging = Staging(CPU, buffers=1, buffer_bytes=BUFFER_BYTES)
    tensor = random(60, torch.float32).view(3, 4, 5)
    assert torch.equal(staging.to_host(tensor, staging.now()), tensor)


def test_many_threads_share_few_buffers() -> None:
    """In and out at once; two threads in one buffer would mix their tensors."""
    staging = Staging(CPU, buffers=3, buffer_bytes=BUFFER_BYTES)

    def there_and_back(numel: int) -> bool:
        tensor = random(numel, torch.bfloat16)
        copy = staging.to_host(tensor, staging.now())
        into = torch.zeros_like(tensor)
        staging.to_device(copy, into, staging.now()).synchronize()
        return torch.equal(into, tensor)

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(there_and_back, range(200, 400)))
    buffers = [staging._free.get_nowait() for _ in range(3)]
    assert staging._free.empty()
    memories = [buffer.memory.data_ptr() for buffer in buffers if buffer is not None]
    assert len(memories) == len(set(memories))


def test_an_error_is_its_own_copy_s_and_no_buffer_is_lost() -> None:
    staging = Staging(CPU, buffers=1, buffer_bytes=BUFFER_BYTES)
    copies = HostCopies(CPU, staging=staging)
    tensor = random(100, torch.float32)

    def fails() -> Tensor:
        raise OSError("no such file")

    shape = {"shape": tensor.shape, "dtype": tensor.dtype}
    broken = copies.fetch(fails, **shape)
    whole = copies.fetch(lambda: tensor, **shape)
    wrong = copies.fetch(lambda: tensor[:10], **shape)
    with pytest.raises(OSError, match="no such file"):
        copies.arrived(broken)
    assert torch.equal(copies.arrived(whole), tensor)
    with pytest.raises(ValueError, match="broadcast"):
        copies.arrived(wrong)
    assert torch.equal(copies.start(tensor).result(), tensor)
    copies.close()


def test_copies_under_way_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each holds its tensor on the device: the one that would be too many waits until another is done."""
    monkeypatch.setattr(lrpq.model.host_copies, "_UNDER_WAY", 2)
    staging = Staging(CPU, buffers=2, buffer_bytes=BUFFER_BYTES)
    copies = HostCopies(CPU, staging=staging)
    go, started = threading.Event(), threading.Semaphore(0)
    plain = staging.to_host

    def held(tensor: Tensor, after: object) -> Tensor:
        started.release()
        go.wait(10)
        return plain(tensor, after)

    monkeypatch.setattr(staging, "to_host", held)
    found = [copies.start(random(10, torch.float32)) for _ in range(2)]
    third = threading.Thread(target=lambda: found.append(copies.start(random(11, torch.float32))))
    third.start()
    assert started.acquire(timeout=10)
    assert started.acquire(timeout=10)
    assert not started.acquire(timeout=0.05)  # the third has not begun
    go.set()
    third.join(10)
    assert [len(copy.result(10)) for copy in found] == [10, 10, 11]
    copies.close()


def test_streamed_weights_go_the_same_way(tmp_path: Path) -> None:
    """As those of a GPU do; also where the next block's are on their way and nobody wants them any more."""
    source = ModelSource(write_llama(tmp_path / "llama", layers=4))
    stream = BlockStream(source, dtype=torch.bfloat16)
    stream._staging = Staging(CPU, buffers=2, buffer_bytes=1000)
    seen = []
    for index, block in stream.stream([3, 0, 2, 1]):
        for name, p in block.state_dict().items():
            assert torch.equal(p, source.read(f"model.layers.{index}.{name}").to(torch.bfloat16))
        seen.append(index)
        if index == 2:
            break
    assert seen == [3, 0, 2]
    plain = BlockStream(source, dtype=torch.bfloat16)
    tokens = torch.arange(12).view(2, 6)
    assert torch.equal(stream.embed(tokens), plain.embed(tokens))


@pytest.mark.parametrize("threads", [2, 5])
def test_weights_read_by_threads_are_the_files(tmp_path: Path, threads: int) -> None:
    """Whatever the pieces; of rows that lie in two tensors too, and where a block is streamed."""
    source = ModelSource(write_llama(tmp_path / "llama", layers=2))
    staging = Staging(CPU, buffers=3, buffer_bytes=104)
    reads = FileReads(source=source, staging=staging, threads=threads)
    names = source.names()
    gate, up = "model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"
    assert reads.can_read(names, torch.float32)
    assert not reads.can_read(names, torch.bfloat16)
    found, arrived = reads.bring({**{name: (name,) for name in names}, "both": (gate, up)})
    staging.wait(arrived)
    for name in names:
        assert torch.equal(found[name], source.read(name))
    assert torch.equal(found["both"], source.read_rows((gate, up)))
    stream = BlockStream(source, dtype=torch.float32)
    stream._staging, stream._reads = staging, reads
    for index, block in stream.stream([1, 0]):
        for name, p in block.state_dict().items():
            assert torch.equal(p, source.read(f"model.layers.{index}.{name}"))


def test_pieces_are_checked_as_tensors_are(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "llama", layers=1)
    name = "model.layers.0.mlp.up_proj.weight"
    file = folder / "model.safetensors"
    begin = ModelSource(folder)._entry(name).begin
    with file.open("r+b") as opened:
        for position in (7, 500):
            opened.seek(begin + 4 * position)
            opened.write(torch.tensor([float("nan")]).numpy().tobytes())
    source = ModelSource(folder)
    reads = FileReads(source=source, staging=Staging(CPU, buffers=1, buffer_bytes=64), threads=2)
    with pytest.raises(ModelError, match=rf"{name} in .*: 2 values are NaN or infinite"):
        reads.bring({name: (name,)})
    with pytest.raises(ModelError, match="2 values"):  # it is not taken for checked
        reads.bring({name: (name,)})
