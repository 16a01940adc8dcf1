"""Seconds spent in functions, by name, for a breakdown: the device is waited for at both ends of every call.

Functions are replaced in every module of the core that has them under their name, and put back afterwards; the core
itself knows nothing of it. Waiting costs time, so totals are measured without timers, and a breakdown says shares.
"""

from __future__ import annotations

import functools
import importlib
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.gpu.measure import now


class Timers:
    """Seconds in each name by itself, in this thread: those of timed calls inside a call are not its own.

    Args:
        device: waited for.
        names: label -> ``module:function`` or ``module:Class.method``.
    """

    def __init__(self, device: torch.device, names: Mapping[str, str]) -> None:
        self.device = device
        self.names = names
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        self.absent: list[str] = []
        """Names that the core does not have (any more): their time is in whatever calls them."""
        self._inner: list[float] = []
        self._thread = threading.get_ident()

    def ranked(self) -> list[tuple[str, float]]:
        """The longest first."""
        return sorted(self.seconds.items(), key=lambda item: -item[1])

    @contextmanager
    def watching(self) -> Iterator[Timers]:
        """Inside, calls are timed."""
        replaced: list[tuple[Any, str, Any]] = []
        try:
            for label, place in self.names.items():
                found = list(_places(place))
                if not found:
                    self.absent.append(place)
                for owner, attribute, original in found:
                    replaced.append((owner, attribute, original))
                    setattr(owner, attribute, self._timed(label, original))
            yield self
        finally:
            for owner, attribute, original in reversed(replaced):
                setattr(owner, attribute, original)

    def _timed(self, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            if threading.get_ident() != self._thread:  # beside the work: only waiting for it costs time
                return function(*arguments, **options)
            started = now(self.device)
            self._inner.append(0.0)
            try:
                return function(*arguments, **options)
            finally:
                whole = now(self.device) - started
                self.seconds[label] += whole - self._inner.pop()
                self.calls[label] += 1
                if self._inner:
                    self._inner[-1] += whole

        return call


def _places(place: str) -> Iterator[tuple[Any, str, Any]]:
    """Everything through which a function is reached: (owner, attribute, function)."""
    path, name = place.split(":")
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError:
        return
    owner, _, attribute = name.rpartition(".")
    if owner:
        holder = getattr(module, owner, None)
        if holder is not None and attribute in vars(holder):
            yield holder, attribute, vars(holder)[attribute]
        return
    original = getattr(module, attribute, None)
    if original is None:
        return
    for loaded in [m for n, m in sorted(sys.modules.items()) if n.split(".")[0] in ("lrpq", "benchmarks")]:
        if vars(loaded).get(attribute) is original:
            yield loaded, attribute, original
