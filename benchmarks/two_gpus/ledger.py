"""What a worker does with its time: calls of the stages, and what of them goes into moving bytes.

Runs on workers, which know nothing of it: functions are replaced in their modules for as long as the process lives.
Only copies to and from the device wait for it first, so that computation still under way is not counted as copying.
"""

from __future__ import annotations

import functools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from tasks import candidates, profile, refine
from tasks.tensor_transport import send_tensors_by_buffer
from tasks.worker import WorkerState

STAGES = (profile, candidates, refine)
"""Modules whose functions are called; with them everything is loaded that they use."""
MOVES = {
    "store, written": ("tasks.store.symmetric:write_symmetric", "tasks.store.tensors:write_tensors"),
    "store, read": ("tasks.store.symmetric:read_symmetric", "tasks.store.tensors:read_tensors"),
    "model, read": ("lrpq.model.safetensors_source:ModelSource.read", "lrpq.model.file_reads:FileReads.bring"),
    "kept inputs": ("lrpq.model.kept:KeptInputs.put", "lrpq.model.kept:KeptInputs.take"),
    "device to host": ("tasks.tensor_transport:sent", "tasks.device_copies:to_host"),
    "host to device": ("tasks.device_copies:to_device",),
    "added on the host": ("tasks.device_copies:added",),
}
"""What moves bytes: label -> functions, as ``module:function`` or ``module:Class.method``. Sums of several workers that
are added up while they are stored count as written."""
OF_DEVICE = ("kept inputs", "device to host", "host to device")
"""Those of them that would wait for the device."""


@dataclass
class Ledger:
    """Of one stage on one worker."""

    calls: dict[str, list[float]] = field(default_factory=dict)
    """Function of the stage -> number of calls, seconds, time of day at which the last one ended."""
    beside: dict[str, list[float]] = field(default_factory=dict)
    """The same of what ran in the thread beside."""
    moved: dict[str, float] = field(default_factory=dict)
    """Label -> seconds in the thread that computes and outside of it, without what ran beside."""
    moved_beside: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0
    """Of device memory, in tensors."""
    reserved_bytes: int = 0
    """Of device memory, taken from the driver."""
    busy: float = 0.0
    """Seconds in which a call was under way; candidates have two at a time."""


_state: dict[str, Any] = {"under_way": 0, "since": 0.0}
"""Of this process: its ledger, and of calls how many are under way and since when one is."""
_inside = threading.local()
_lock = threading.Lock()


def start(state: WorkerState) -> None:
    """Begin to keep a ledger, with everything warm from here on."""
    if "ledger" not in _state:
        state.run = _noted("calls", state.run)  # type: ignore[method-assign]
        state.run_beside = _noted("beside", state.run_beside)  # type: ignore[method-assign]
        for label, places in MOVES.items():
            for place in places:
                for owner, attribute, original in _reached(place):
                    setattr(owner, attribute, _timed(label, original))
        send_tensors_by_buffer()  # again: Ray holds on to the function that it was given
    _renew()


def finish(state: WorkerState) -> Ledger:
    """The ledger since the last time; another one begins."""
    ledger: Ledger = _state["ledger"]
    if torch.cuda.is_available():
        ledger.peak_bytes = torch.cuda.max_memory_allocated()
        ledger.reserved_bytes = torch.cuda.max_memory_reserved()
    _renew()
    return ledger


def device_name(state: WorkerState) -> str:
    """What this worker computes on."""
    return torch.cuda.get_device_name() if state.device == "cuda" else "CPU"


def _renew() -> None:
    _state["ledger"] = Ledger()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _noted(which: str, run: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(run)
    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        if function.__module__ == __name__:  # the ledger's own
            return run(function, *arguments)
        began = time.perf_counter()
        # and it stays so: a thread runs one kind of call, and Ray copies results in it afterwards
        _inside.beside = which == "beside"
        with _lock:
            if which == "calls":
                _state["since"] = _state["since"] if _state["under_way"] else began
                _state["under_way"] += 1
        try:
            return run(function, *arguments)
        finally:
            with _lock:
                ledger: Ledger = _state["ledger"]
                entry = getattr(ledger, which).setdefault(function.__name__, [0.0, 0.0, 0.0])
                entry[0] += 1
                entry[1] += time.perf_counter() - began
                entry[2] = time.time()
                if which == "calls":
                    _state["under_way"] -= 1
                    ledger.busy += 0.0 if _state["under_way"] else time.perf_counter() - _state["since"]

    return call


def _timed(label: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        if getattr(_inside, "moving", False):  # counted already
            return function(*arguments, **options)
        beside = getattr(_inside, "beside", None)  # a thread that runs no call waits for no computation either
        if label in OF_DEVICE and torch.cuda.is_available() and beside is False:
            torch.cuda.synchronize()
        _inside.moving = True
        began = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            seconds = time.perf_counter() - began
            with _lock:
                moved = _state["ledger"].moved_beside if beside else _state["ledger"].moved
                moved[label] = moved.get(label, 0.0) + seconds
            _inside.moving = False

    return call


def _reached(place: str) -> Iterator[tuple[Any, str, Any]]:
    """Everything through which a function is reached: (owner, attribute, function)."""
    path, name = place.split(":")
    module = sys.modules[path]
    owner, _, attribute = name.rpartition(".")
    if owner:
        yield getattr(module, owner), attribute, vars(getattr(module, owner))[attribute]
        return
    original = getattr(module, attribute)
    for loaded in [m for n, m in sorted(sys.modules.items()) if n.split(".")[0] in ("lrpq", "tasks")]:
        if vars(loaded).get(attribute) is original:
            yield loaded, attribute, original
