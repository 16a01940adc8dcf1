"""Ctrl-C that a library swallows still ends the run at its next step."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

import pytest

from flows import ctrl_c
from flows.boundary import Interrupted, resumable
from lrpq.errors import ConfigError


@pytest.fixture(autouse=True)
def handled() -> Iterator[None]:
    """Python's own handler, which a test run in the background does not have."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def test_a_swallowed_interrupt_is_raised_at_the_next_step() -> None:
    with ctrl_c.remembered():
        ctrl_c.raise_if_asked()
        with pytest.raises(KeyboardInterrupt):  # as it always was
            interrupt()
        with pytest.raises(KeyboardInterrupt):  # and once more, in case the first one was dropped
            ctrl_c.raise_if_asked()


def test_the_former_handler_is_back_and_nothing_is_remembered() -> None:
    former = signal.getsignal(signal.SIGINT)
    with ctrl_c.remembered():
        assert signal.getsignal(signal.SIGINT) is not former
        with pytest.raises(KeyboardInterrupt):
            interrupt()
    assert signal.getsignal(signal.SIGINT) is former
    with ctrl_c.remembered():
        ctrl_c.raise_if_asked()


def test_outside_the_main_thread_no_handler_is_set() -> None:
    seen: list[object] = []

    def run() -> None:
        with ctrl_c.remembered():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]


def test_an_ignored_interrupt_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with ctrl_c.remembered():
        interrupt()
        ctrl_c.raise_if_asked()


def interrupted_then(error: Exception) -> None:
    """As a library does whose own cleaning up fails: no link to what interrupted it."""
    with contextlib.suppress(KeyboardInterrupt):
        interrupt()
    raise error


def test_an_error_of_the_cleaning_up_is_the_interruption() -> None:
    with pytest.raises(Interrupted), resumable("m-12345678"):
        interrupted_then(ValueError("Task run is not set"))


def test_an_error_the_user_can_act_upon_stays_what_it_is() -> None:
    with pytest.raises(ConfigError), resumable():
        interrupted_then(ConfigError("budget 1: too small"))
    with pytest.raises(ValueError, match="a mistake"), resumable():  # the earlier Ctrl-C is forgotten
        raise ValueError("a mistake")
