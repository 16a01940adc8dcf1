"""Ctrl-C that is not lost: a library may swallow the exception, the flag stays.

Python raises KeyboardInterrupt wherever the main thread happens to be. Inside a destructor or a callback it is printed
and dropped, and the run would go on as if nobody had asked. The flag is looked at before every step.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_asked = threading.Event()


@contextmanager
def remembered() -> Iterator[None]:
    """Inside, SIGINT is remembered and then handled as it was before.

    Nothing changes where it is ignored (as in a job that a shell put in the background) or outside the main thread.
    """
    _asked.clear()
    former = signal.getsignal(signal.SIGINT)
    if not callable(former) or threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, frame: FrameType | None) -> None:
        _asked.set()
        former(number, frame)

    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)


def was_asked() -> bool:
    """Whether Ctrl-C came since ``remembered`` was last entered."""
    return _asked.is_set()


def raise_if_asked() -> None:
    """Raise KeyboardInterrupt if Ctrl-C came and was lost."""
    if was_asked():
        raise KeyboardInterrupt
