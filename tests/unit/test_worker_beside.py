"""What runs beside a worker's computation shows in its signs of life."""

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
