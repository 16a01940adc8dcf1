"""When a worker is given up: silence, standstill, a start that never ends, and when it is not."""

from __future__ import annotations

import pytest

from tasks.watch import MOST_AT_ONCE, OVERDUE, STANDSTILL_SECONDS, START_SECONDS, Pulse, Watch

PATIENCE = 10.0


def pulse(step: str = "forward", *, seconds: float = 0.0, steps: tuple[float, ...] = ()) -> Pulse:
    return Pulse(step=step, seconds=seconds, steps=tuple(("forward", value) for value in steps))


def silent_for(watch: Watch, worker: object, seconds: float) -> None:
    while seconds > 0:
        watch.waited(worker, min(seconds, 1.0))
        seconds -= 1.0


@pytest.fixture
def watch() -> Watch:
    watch = Watch(patience=PATIENCE)
    for worker in ("a", "b"):
        watch.created(worker)
        watch.heard(worker, pulse())
    return watch


def test_silence_is_allowed_for_as_long_as_the_patience(watch: Watch) -> None:
    silent_for(watch, "a", PATIENCE)
    assert watch.why_overdue("a") is None
    silent_for(watch, "a", 1.0)
    assert watch.why_overdue("a") == "it was silent for 11 s"
    assert watch.why_overdue("b") is None


def test_an_answer_ends_a_silence(watch: Watch) -> None:
    silent_for(watch, "a", PATIENCE)
    watch.heard("a", pulse())
    silent_for(watch, "a", PATIENCE)
    assert watch.why_overdue("a") is None


def test_where_steps_are_long_silence_is_allowed_for_five_of_them(watch: Watch) -> None:
    watch.heard("b", pulse(steps=(6.0, 8.0, 7.0)))  # the median counts, whoever measured it
    assert watch.median("forward") == 7.0
    silent_for(watch, "a", OVERDUE * 7)
    assert watch.why_overdue("a") is None
    silent_for(watch, "a", 1.0)
    assert watch.why_overdue("a") is not None


def test_one_slow_step_does_not_move_the_limit(watch: Watch) -> None:
    watch.heard("b", pulse(steps=(0.1, 0.1, 0.1, 500.0)))
    silent_for(watch, "a", PATIENCE + 1)
    assert watch.why_overdue("a") is not None


def test_a_driver_that_was_stopped_blames_nobody(watch: Watch) -> None:
    watch.waited("a", 3600.0)
    assert MOST_AT_ONCE < PATIENCE
    assert watch.why_overdue("a") is None


def test_an_answer_without_progress_is_a_standstill(watch: Watch) -> None:
    watch.heard("b", pulse(steps=(1.0,)))
    watch.heard("a", pulse(seconds=STANDSTILL_SECONDS))
    assert watch.why_overdue("a") is None
    watch.heard("a", pulse(seconds=STANDSTILL_SECONDS + 1))
    assert watch.why_overdue("a") == f"it finished nothing for {STANDSTILL_SECONDS + 1:.0f} s, forward takes 1.0 s"


def test_no_standstill_before_a_step_is_known_or_without_work(watch: Watch) -> None:
    watch.heard("a", pulse("a-function-nobody-has-finished", seconds=10 * STANDSTILL_SECONDS))
    watch.heard("b", pulse("", seconds=10 * STANDSTILL_SECONDS, steps=(1.0,)))
    assert watch.why_overdue("a") is None
    assert watch.why_overdue("b") is None


def test_a_worker_that_never_starts() -> None:
    watch = Watch(patience=PATIENCE)
    watch.created("a")
    silent_for(watch, "a", START_SECONDS)
    assert watch.why_overdue("a") is None  # torch may take its time to be imported
    silent_for(watch, "a", 1.0)
    assert watch.why_overdue("a") == f"it did not start within {START_SECONDS:.0f} s"
    assert not watch.has_started("a")
