"""How many threads of this process move bytes: compress, hash and copy what goes to the store and comes from it.

A worker on a GPU has cores that its computations do not use, and what it stores of one block of a 70B model are
gigabytes. These threads are none of PyTorch's: those split sums, so their number is part of a result's identity
(tasks.store.keys); the number here changes no byte of anything.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from typing import TypeVar

T = TypeVar("T")
_THREADS: ContextVar[int] = ContextVar("threads that move bytes", default=1)


def host_threads() -> int:
    """Threads that the caller may use; 1 unless somebody has said so."""
    return _THREADS.get()


def set_host_threads(threads: int) -> None:
    """From now on, for what the calling thread calls."""
    _THREADS.set(threads)


def in_order(calls: Iterable[Callable[[], T]]) -> Generator[T, None, None]:
    """Results of calls, in their order, each made in one of so many threads; in the caller's own where it is one.

    No more calls than threads are under way or wait to be taken: what they return bounds memory. Close it when it is
    not read to its end.
    """
    threads = host_threads()
    if threads == 1:
        for call in calls:
            yield call()
        return
    coming: deque[Future[T]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="lrpq-host") as pool:
        try:
            for call in calls:
                if len(coming) == threads:
                    yield coming.popleft().result()
                coming.append(pool.submit(call))
            while coming:
                yield coming.popleft().result()
        finally:
            for future in coming:
                future.cancel()


def begun(calls: Iterable[Callable[[], T]]) -> list[Future[T]]:
    """Begin to make calls, one after the other, in a thread of their own that may use as many threads as the caller.

    A call, and what only it holds, is given up when it has been made.
    """
    with_thread = ThreadPoolExecutor(1, thread_name_prefix="lrpq-beside")
    try:
        return [with_thread.submit(copy_context().run, call) for call in calls]
    finally:
        with_thread.shutdown(wait=False)


def made(value: T) -> Future[T]:
    """What has been found already, for those who would wait for it."""
    there: Future[T] = Future()
    there.set_result(value)
    return there
