"""Threads that move bytes: what they make is what one makes, they hold no more than they may, and errors come out."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lrpq.errors import StoreError
from tasks.store.host_threads import begun, host_threads, in_order, made, set_host_threads
from tasks.store.objects import open_store
from tasks.store.tensors import read_symmetric, read_tensors, write_symmetric, write_tensors

KEYS = ("h.parquet", "t.safetensors")


class Thing:
    pass


@pytest.fixture(autouse=True)
def one_thread_afterwards() -> Iterator[None]:
    yield
    set_host_threads(1)


def matrices() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(700, 700, generator=generator)
    return {"a": wide + wide.T, "b": torch.eye(40), "c": torch.zeros(300, 300)}


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {f"{i}": torch.randn(50 + i, 7, generator=generator).to(torch.bfloat16 if i % 2 else None) for i in range(9)}


def stored(folder: Path, threads: int) -> list[bytes]:
    set_host_threads(threads)
    store = open_store(str(folder / str(threads)))
    write_symmetric(store, KEYS[0], matrices(), {"a": {"tokens": 7}})
    write_tensors(store, KEYS[1], tensors(), {"of": "text"})
    return [(folder / str(threads) / key).read_bytes() for key in KEYS]


def test_stored_bytes_do_not_depend_on_the_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.store.symmetric.TILES_PER_GROUP", 2)  # the 6 tiles of "a" are three row groups
    one = stored(tmp_path, 1)
    assert stored(tmp_path, 2) == one
    assert stored(tmp_path, 5) == one
    store = open_store(str(tmp_path / "1"))
    for name, matrix in matrices().items():
        assert torch.equal(read_symmetric(store, KEYS[0], name)[0], matrix)
    found = read_tensors(store, KEYS[1])
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors().items())


@pytest.mark.parametrize("ending", KEYS)
def test_a_changed_byte_is_found_by_any_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    monkeypatch.setattr("tasks.store.symmetric.TILES_PER_GROUP", 2)
    stored(tmp_path, 3)
    path = tmp_path / "3" / ending
    raw = bytearray(path.read_bytes())
    raw[2 * len(raw) // 3] ^= 1
    path.unlink()
    path.write_bytes(raw)
    store = open_store(str(tmp_path / "3"))
    with pytest.raises(StoreError, match="damaged"):
        [read_symmetric(store, ending, name) for name in matrices()] if ending == KEYS[0] else read_tensors(
            store, ending
        )


def test_results_come_in_order_and_no_more_are_under_way_than_threads() -> None:
    set_host_threads(3)
    begun: list[int] = []
    taken: list[int] = []
    lock = threading.Lock()

    def call(number: int) -> int:
        with lock:
            begun.append(number)
            assert len(begun) - len(taken) <= 3 + 1  # one more has been handed out
        return number

    with closing(in_order((lambda n=n: call(n)) for n in range(20))) as results:
        for number in results:
            with lock:
                taken.append(number)
    assert taken == list(range(20))


def test_an_error_ends_the_rest_and_reaches_the_caller() -> None:
    set_host_threads(2)
    done: list[int] = []

    def call(number: int) -> None:
        if number == 3:
            raise ValueError("three")
        done.append(number)

    with pytest.raises(ValueError, match="three"):
        list(in_order((lambda n=n: call(n)) for n in range(100)))
    assert len(done) <= 3 + 2


def test_threads_are_those_of_the_thread_that_was_told() -> None:
    set_host_threads(4)
    seen: list[int] = []
    other = threading.Thread(target=lambda: seen.append(host_threads()))
    other.start()
    other.join()
    assert (host_threads(), seen) == (4, [1])


def test_calls_that_are_begun_run_one_after_the_other_elsewhere_and_hold_nothing() -> None:
    set_host_threads(3)
    begin, order = threading.Event(), list[int]()
    held = [Thing() for _ in range(4)]
    seen = [weakref.ref(thing) for thing in held]

    def call(thing: Thing, number: int) -> tuple[int, int, bool]:
        begin.wait(10)
        order.append(number)
        return number, host_threads(), threading.current_thread() is threading.main_thread()

    coming = begun(partial(call, held.pop(0), number) for number in range(4))
    assert order == []  # the caller goes on
    begin.set()
    assert [future.result(10) for future in coming] == [(number, 3, False) for number in range(4)]
    assert order == [0, 1, 2, 3]
    gc.collect()
    assert [reference() for reference in seen] == [None] * 4


def test_what_fails_beside_is_raised_where_it_is_asked_for() -> None:
    def fail() -> None:
        raise OSError("no room")

    first, second = begun([fail, lambda: None])
    with pytest.raises(OSError, match="no room"):
        first.result(10)
    assert second.result(10) is None
    assert made(7).result(0) == 7
