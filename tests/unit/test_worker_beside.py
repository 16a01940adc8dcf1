"""What runs beside a worker's computation, or overlaps with it, shows in its signs of life."""

from __future__ import annotations

import threading

from tasks.watch import Pulse
from tasks.worker import Place, WorkerState


def test_a_function_beside_is_the_step_of_an_idle_worker_and_its_end_is_counted() -> None:
    state = WorkerState(device="cpu", threads=1, kept_bytes=0, place=Place(index=0, num_workers=1, epoch=0))
    pulses: list[Pulse] = []
    begun, go_on = threading.Event(), threading.Event()

    def storing(state: WorkerState, number: int) -> int:
        begun.set()
        assert go_on.wait(10)
        return number

    def computing(state: WorkerState) -> None:
        pulses.append(state.pulse())

    thread = threading.Thread(target=lambda: state.run_beside(storing, 7))
    thread.start()
    assert begun.wait(10)
    pulses.append(state.pulse())
    state.run(computing)
    go_on.set()
    thread.join()
    pulses.append(state.pulse())
    assert [pulse.step.rsplit(".", 1)[-1] for pulse in pulses] == ["storing", "computing", ""]
    assert any(name.endswith("storing") for name, _ in pulses[-1].steps)


def test_of_two_calls_the_one_that_is_longer_without_a_sign_is_the_step_and_each_beats_for_itself() -> None:
    state = WorkerState(device="cpu", threads=1, kept_bytes=0, place=Place(index=0, num_workers=1, epoch=0))
    go_on, waits = threading.Event(), threading.Event()

    def reading(state: WorkerState) -> None:
        waits.set()
        assert go_on.wait(10)

    def computing(state: WorkerState) -> list[Pulse]:
        before = state.pulse()
        state.beat()
        return [before, state.pulse()]

    thread = threading.Thread(target=lambda: state.run(reading))
    thread.start()
    assert waits.wait(10)
    before, after = state.run(computing)
    go_on.set()
    thread.join()
    last = state.pulse()
    assert before.step.endswith("reading")
    assert after.step.endswith("reading")
    assert [name.rsplit(".", 1)[-1] for name, _ in after.steps] == ["computing"]
    assert [name.rsplit(".", 1)[-1] for name, _ in last.steps] == ["computing", "reading"]
    assert last.step == ""


def test_nothing_is_forgotten_while_a_call_computes() -> None:
    state = WorkerState(device="cpu", threads=1, kept_bytes=0, place=Place(index=0, num_workers=1, epoch=0))
    state.held["source"] = object()
    thread = threading.Thread(target=state.clear)
    with state.computing:
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        assert "source" in state.held
    thread.join(10)
    assert not state.held
