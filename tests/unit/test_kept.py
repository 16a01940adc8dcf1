"""Kept block inputs: what is put comes back to the bit, wherever it was kept, and nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lrpq.model.spill
from lrpq.model.host_copies import HostCopies
from lrpq.model.kept import KeptInputs
from lrpq.model.spill import PREFIX, UNDER_WAY


def tensor(seed: int, *, dtype: torch.dtype = torch.float32, rows: int = 3) -> Tensor:
    return torch.randn(2, rows, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and a.contiguous().view(torch.uint8).equal(b.contiguous().view(torch.uint8))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_bytes", [0, 200, 1 << 20])
def test_tensors_come_back_to_the_bit_in_any_order(tmp_path: Path, dtype: torch.dtype, memory_bytes: int) -> None:
    with KeptInputs(memory_bytes=memory_bytes, folder=tmp_path) as kept:
        for i in range(6):
            kept.put((i, 0, 2 * i), tensor(i, dtype=dtype))
        for i in (5, 0, 3, 1, 4, 2):
            assert same_bits(kept.take((i, 0, 2 * i)), tensor(i, dtype=dtype))


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(st.integers(1, 9), min_size=1, max_size=8), memory_bytes=st.integers(0, 1000))
def test_memory_is_never_above_its_limit_and_every_byte_is_counted(rows: list[int], memory_bytes: int) -> None:
    with KeptInputs(memory_bytes=memory_bytes) as kept:
        total = 0
        for i, n in enumerate(rows):
            kept.put((i,), tensor(i, rows=n))
            total += 2 * n * 4 * 4
            assert kept.held_bytes <= memory_bytes
            assert kept.held_bytes + kept.spilled_bytes == total
        for i, n in enumerate(rows):
            assert same_bits(kept.take((i,)), tensor(i, rows=n))
        assert kept.held_bytes == 0


def test_memory_that_is_freed_is_used_again(tmp_path: Path) -> None:
    with KeptInputs(memory_bytes=96, folder=tmp_path) as kept:  # one tensor of 2 x 3 x 4 floats
        for i in range(4):
            kept.put((i,), tensor(i))
            kept.take((i,))
        assert kept.spilled_bytes == 0
        assert list(tmp_path.iterdir()) == []  # no folder is made where none is needed


def test_a_view_is_kept_as_what_it_shows(tmp_path: Path) -> None:
    whole = tensor(0)
    for memory_bytes in (0, 1 << 20):
        with KeptInputs(memory_bytes=memory_bytes, folder=tmp_path) as kept:
            kept.put((0,), whole.transpose(1, 2))
            assert torch.equal(kept.take((0,)), whole.transpose(1, 2))


@pytest.mark.parametrize("memory_bytes", [0, 1 << 20])
def test_each_tensor_is_taken_once(tmp_path: Path, memory_bytes: int) -> None:
    with KeptInputs(memory_bytes=memory_bytes, folder=tmp_path) as kept:
        kept.put((1, 2), tensor(0))
        with pytest.raises(KeyError):
            kept.take((2, 1))
        kept.take((1, 2))
        with pytest.raises(KeyError):
            kept.take((1, 2))


def test_spilled_files_go_when_taken_and_the_rest_on_closing(tmp_path: Path) -> None:
    kept = KeptInputs(memory_bytes=0, folder=tmp_path)
    for i in range(3):
        kept.put((i,), tensor(i))
    assert kept.count == 3  # all are written
    (folder,) = tmp_path.iterdir()
    assert len(list(folder.iterdir())) == 3
    kept.take((1,))
    assert len(list(folder.iterdir())) == 2
    kept.close()
    assert list(tmp_path.iterdir()) == []
    kept.close()  # closing again is no mistake
    with pytest.raises(KeyError):
        kept.take((0,))


def test_spill_folder_goes_also_after_an_exception(tmp_path: Path) -> None:
    kept = KeptInputs(memory_bytes=0, folder=tmp_path)

    def fails() -> None:
        with kept:
            kept.put((0,), tensor(0))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert list(tmp_path.iterdir()) == []


def test_two_stores_in_one_folder_do_not_meet(tmp_path: Path) -> None:
    with KeptInputs(memory_bytes=0, folder=tmp_path) as a, KeptInputs(memory_bytes=0, folder=tmp_path) as b:
        a.put((0,), tensor(1))
        b.put((0,), tensor(2))
        assert torch.equal(a.take((0,)), tensor(1))
        assert torch.equal(b.take((0,)), tensor(2))


def test_what_was_spilled_may_be_changed_by_its_new_owner(tmp_path: Path) -> None:
    with KeptInputs(memory_bytes=0, folder=tmp_path) as kept:
        kept.put((0,), tensor(0))
        taken = kept.take((0,))
        taken += 1  # not a view of a file that is gone
        assert torch.equal(taken, tensor(0) + 1)


def full(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def test_without_room_a_tensor_is_forgotten_only_where_it_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lrpq.model.spill, "save_file", full)
    with KeptInputs(memory_bytes=96, folder=tmp_path, may_forget=True) as kept:
        for i in range(3):
            kept.put((i,), tensor(i))
        assert [(i,) in kept for i in range(3)] == [True, False, False]
        assert (kept.held_bytes, kept.spilled_bytes, kept.forgotten_bytes) == (96, 0, 192)
        assert same_bits(kept.take((0,)), tensor(0))
        assert not list(tmp_path.rglob("*.safetensors"))
    asked: list[Callable[[KeptInputs], object]] = [
        lambda kept: kept.take((0,)),
        lambda kept: (0,) in kept,
        lambda kept: kept.forget_before(1),
        lambda kept: kept.spilled_bytes,
        lambda kept: [kept.put((1 + i,), tensor(i)) for i in range(UNDER_WAY)],
    ]
    for ask in asked:  # whatever comes next says so, once
        with KeptInputs(memory_bytes=0, folder=tmp_path) as kept:
            kept.put((0,), tensor(0))
            with pytest.raises(OSError, match=r"cannot keep a block's inputs in .*No space left on device"):
                ask(kept)
            assert (0,) not in kept
    missing = KeptInputs(memory_bytes=0, folder=tmp_path / "missing")
    with pytest.raises(OSError, match="cannot keep"):
        missing.put((0,), tensor(0))
    assert (0,) not in missing


def test_what_a_put_that_raises_was_to_keep_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lrpq.model.spill, "save_file", full)
    with KeptInputs(memory_bytes=0, folder=tmp_path) as kept:
        for i in range(UNDER_WAY + 1):
            try:
                kept.put((i,), tensor(i))
            except OSError:
                break
        else:
            pytest.fail("no put has raised")
        assert i > 0  # an earlier one's error
        assert (i,) not in kept
        with pytest.raises(KeyError):
            kept.take((i,))


@pytest.mark.parametrize("may_forget", [False, True])
def test_an_error_that_is_no_want_of_room_is_one_and_the_tensor_gone(
    tmp_path: Path, may_forget: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(lrpq.model.spill, "save_file", fails)
    with KeptInputs(memory_bytes=0, folder=tmp_path, may_forget=may_forget) as kept:
        kept.put((0,), tensor(0))
        with pytest.raises(MemoryError):
            kept.take((0,))
        assert (0,) not in kept
        assert (kept.spilled_bytes, kept.forgotten_bytes) == (0, 0)


@pytest.mark.usefixtures("copied")
def test_nothing_is_left_where_copies_end_with_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = KeptInputs(memory_bytes=0, folder=tmp_path)
    kept.put((0,), tensor(0))
    close = HostCopies.close

    def fails(copies: HostCopies) -> None:
        close(copies)
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(HostCopies, "close", fails)
    with pytest.raises(RuntimeError, match="the device is lost"):
        kept.close()
    assert list(tmp_path.iterdir()) == []
    kept.close()


@pytest.fixture
def held_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[Event]:
    """Files are written when the event is set, not before."""
    go, save_file = Event(), lrpq.model.spill.save_file

    def save(*arguments: Any) -> None:
        assert go.wait(60)
        save_file(*arguments)

    monkeypatch.setattr(lrpq.model.spill, "save_file", save)
    yield go
    go.set()


@pytest.mark.parametrize("gpu", [False, True])
def test_files_are_written_beside_what_their_owner_does(
    tmp_path: Path, gpu: bool, held_back: Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lrpq.model.kept, "_is_gpu", lambda _: gpu)
    with KeptInputs(memory_bytes=0, folder=tmp_path) as kept, ThreadPoolExecutor(1) as beside:
        for i in range(UNDER_WAY):
            kept.put((i,), tensor(i))  # returns, though nothing can be written
        assert not list(tmp_path.rglob("*.safetensors"))
        more = beside.submit(kept.put, (UNDER_WAY,), tensor(UNDER_WAY))
        with pytest.raises(TimeoutError):  # no more at once than that
            more.result(0.2)
        held_back.set()
        more.result(60)
        for i in reversed(range(UNDER_WAY + 1)):
            assert same_bits(kept.take((i,)), tensor(i))
        assert kept.spilled_bytes == (UNDER_WAY + 1) * 96


def test_closing_waits_for_the_write_that_is_made_and_makes_no_other(tmp_path: Path, held_back: Event) -> None:
    kept = KeptInputs(memory_bytes=0, folder=tmp_path)
    for i in range(UNDER_WAY):
        kept.put((i,), tensor(i))
    with ThreadPoolExecutor(1) as beside:
        closed = beside.submit(kept.close)
        with pytest.raises(TimeoutError):
            closed.result(0.2)
        held_back.set()
        closed.result(60)
    assert list(tmp_path.iterdir()) == []
    assert kept.count == 0


def test_room_is_made_by_forgetting_the_first_blocks(tmp_path: Path) -> None:
    with KeptInputs(memory_bytes=200, folder=tmp_path) as kept:
        for block in range(4):
            kept.put((block, 0), tensor(block))
        kept.forget_before(3)
        assert [(block, 0) in kept for block in range(4)] == [False, False, False, True]
        assert kept.held_bytes == 0  # the last one is on disk
        assert len(list(tmp_path.rglob("*.safetensors"))) == 1
        kept.put((4, 0), tensor(4))
        assert kept.held_bytes == 96
        assert same_bits(kept.take((3, 0)), tensor(3))


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_keeps_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    abandoned = tmp_path / f"{PREFIX}abandoned"
    abandoned.mkdir()
    (abandoned / "0-0.safetensors").write_bytes(b"x")
    monkeypatch.setattr(lrpq.model.spill, "_YOUNG_SECONDS", -1.0)
    with KeptInputs(memory_bytes=0, folder=tmp_path) as first, KeptInputs(memory_bytes=0, folder=tmp_path) as second:
        first.put((0,), tensor(0))
        second.put((0,), tensor(1))
        assert not abandoned.exists()
        assert same_bits(first.take((0,)), tensor(0))
        assert same_bits(second.take((0,)), tensor(1))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the CPU go the way of a GPU's: through buffers, by threads, and back when they are expected."""
    monkeypatch.setattr(lrpq.model.kept, "_is_gpu", lambda _: True)


@pytest.mark.usefixtures("copied")
@pytest.mark.parametrize("memory_bytes", [0, 300, 1 << 20])
def test_expected_tensors_come_back_to_the_bit_and_others_too(tmp_path: Path, memory_bytes: int) -> None:
    order = [7, 6, 5, 0, 4, 3, 2, 1]
    with KeptInputs(memory_bytes=memory_bytes, folder=tmp_path) as kept:
        for i in range(8):
            kept.put((i,), tensor(i, dtype=torch.bfloat16, rows=i + 1))
        kept.expect((i,) for i in [9, *order[:3], *order[4:]])  # one that is not kept, and one that comes unexpected
        for turn, i in enumerate(order):
            assert same_bits(kept.take((i,)), tensor(i, dtype=torch.bfloat16, rows=i + 1))
            assert all((j,) in kept for j in order[turn + 1 :])
            assert (i,) not in kept
        assert kept.held_bytes == 0
        assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.usefixtures("copied")
def test_what_was_expected_can_be_forgotten(tmp_path: Path) -> None:
    with KeptInputs(memory_bytes=200, folder=tmp_path) as kept:
        for block in range(5):
            kept.put((block, 0), tensor(block))
        kept.expect((block, 0) for block in range(5))
        kept.forget_before(4)
        assert [(block, 0) in kept for block in range(5)] == [False] * 4 + [True]
        assert kept.held_bytes == 0
        assert same_bits(kept.take((4, 0)), tensor(4))
        kept.put((5, 0), tensor(5))
        kept.expect([(5, 0)])
    with pytest.raises(KeyError):
        kept.take((5, 0))


@pytest.mark.usefixtures("copied")
def test_a_file_that_is_gone_is_an_error_of_its_taker(tmp_path: Path) -> None:
    with KeptInputs(memory_bytes=0, folder=tmp_path) as kept:
        kept.put((0,), tensor(0))
        kept.put((1,), tensor(1))
        assert kept.count == 2  # both are written
        for path in tmp_path.rglob("0.safetensors"):
            path.unlink()
        kept.expect([(0,), (1,)])
        with pytest.raises(FileNotFoundError):
            kept.take((0,))
        assert same_bits(kept.take((1,)), tensor(1))
