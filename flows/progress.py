"""What a run shows while it goes on, on stderr: bars on a terminal, plain lines elsewhere, JSON if asked."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.text import Text

PLAIN_SECONDS = 10.0
"""A stage writes a plain line at most this often: a log of hours stays readable."""


class Progress(Protocol):
    """How a run reports; every stage is announced, advanced ``total`` times and closed.

    After the loss of a worker it is announced again, with what is left of it.
    """

    def stage(self, name: str, total: int, unit: str = "block") -> None:
        """A stage of ``total`` units begins."""
        ...

    def advance(self, name: str, detail: str = "") -> None:
        """One more unit of the stage is done; ``detail`` says which."""
        ...

    def done(self, name: str, *, seconds: float, reused: bool) -> None:
        """The stage is complete; ``reused``: it was found in the store (then it was never announced)."""
        ...

    def note(self, text: str) -> None:
        """A warning."""
        ...

    def tell(self, text: str) -> None:
        """What a person waits to know, as soon as it is known."""
        ...


@dataclass(slots=True, kw_only=True)
class StageClock:
    """Counts a stage's units and estimates the time left.

    From the mean over the whole stage: a block may take minutes, and an estimate over a short window (Rich's
    own) then has nothing to go by.
    """

    total: int
    unit: str
    clock: Callable[[], float]
    done: int = 0
    started: float = field(init=False)

    def __post_init__(self) -> None:
        self.started = self.clock()

    def seconds_left(self) -> float | None:
        """Seconds until the stage is complete; None before its first unit."""
        if not self.done:
            return None
        return (self.clock() - self.started) / self.done * max(self.total - self.done, 0)


def shown_seconds(seconds: float) -> str:
    """Text such as ``0.4 s``, ``12 s``, ``3 min 20 s`` or ``2 h 05 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def closing_line(name: str, clock: StageClock | None, *, seconds: float, reused: bool) -> str:
    """Say that a stage is complete."""
    if reused:
        return f"{name}: found in the store"
    units = "" if clock is None or clock.total == 1 else f"{_counted(clock.total, clock.unit)} in "
    return f"{name}: {units}{shown_seconds(seconds)}"


class PlainProgress:
    """Lines of text, for logs."""

    def __init__(self, stream: IO[str], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._stages: dict[str, StageClock] = {}
        self._written: dict[str, float] = {}

    def stage(self, name: str, total: int, unit: str = "block") -> None:
        """See Progress."""
        self._stages[name] = StageClock(total=total, unit=unit, clock=self._clock)
        self._written[name] = self._clock()
        self._line(f"{name}: {_counted(total, unit)}")

    def advance(self, name: str, detail: str = "") -> None:
        """See Progress."""
        stage = self._stages[name]
        stage.done += 1
        if stage.done >= stage.total or self._clock() - self._written[name] < PLAIN_SECONDS:
            return
        self._written[name] = self._clock()
        suffix = f", {detail}" if detail else ""
        self._line(f"{name}: {stage.done}/{stage.total}{suffix}, {shown_seconds(stage.seconds_left() or 0.0)} left")

    def done(self, name: str, *, seconds: float, reused: bool) -> None:
        """See Progress."""
        self._line(closing_line(name, self._stages.pop(name, None), seconds=seconds, reused=reused))

    def note(self, text: str) -> None:
        """See Progress."""
        self._line(f"warning: {text}")

    def tell(self, text: str) -> None:
        """See Progress."""
        self._line(text)

    def _line(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class JsonlProgress:
    """One JSON object a line, for programs that watch a run."""

    def __init__(self, stream: IO[str], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._stages: dict[str, StageClock] = {}

    def stage(self, name: str, total: int, unit: str = "block") -> None:
        """See Progress."""
        self._stages[name] = StageClock(total=total, unit=unit, clock=self._clock)
        self._event("stage", name=name, total=total, unit=unit)

    def advance(self, name: str, detail: str = "") -> None:
        """See Progress."""
        stage = self._stages[name]
        stage.done += 1
        left = stage.seconds_left()
        left = None if left is None else round(left, 3)
        self._event("advance", name=name, done=stage.done, total=stage.total, detail=detail, seconds_left=left)

    def done(self, name: str, *, seconds: float, reused: bool) -> None:
        """See Progress."""
        self._stages.pop(name, None)
        self._event("done", name=name, seconds=round(seconds, 3), reused=reused)

    def note(self, text: str) -> None:
        """See Progress."""
        self._event("note", text=text)

    def tell(self, text: str) -> None:
        """See Progress."""
        self._event("told", text=text)

    def _event(self, event: str, **fields: Any) -> None:
        print(json.dumps({"event": event, **fields}), file=self._stream, flush=True)


class RichProgress:
    """A bar a stage with its units, the current one and the time left; complete stages become lines above."""

    def __init__(self, bars: Bars, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._bars = bars
        self._clock = clock
        self._stages: dict[str, tuple[StageClock, TaskID]] = {}

    @classmethod
    def columns(cls) -> tuple[ProgressColumn, ...]:
        """Columns of the bars that the class writes to."""
        return (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} {task.fields[unit]}s", markup=False),
            _TimeLeft(),
            TextColumn("{task.fields[detail]}", style="dim", markup=False),
        )

    def stage(self, name: str, total: int, unit: str = "block") -> None:
        """See Progress."""
        clock = StageClock(total=total, unit=unit, clock=self._clock)
        if name in self._stages:  # begun again, with what is left of it
            self._bars.remove_task(self._stages[name][1])
        task = self._bars.add_task(name, total=total, unit=unit, detail="", clock=clock)
        self._stages[name] = (clock, task)

    def advance(self, name: str, detail: str = "") -> None:
        """See Progress."""
        clock, task = self._stages[name]
        clock.done += 1
        self._bars.update(task, completed=clock.done, detail=detail)

    def done(self, name: str, *, seconds: float, reused: bool) -> None:
        """See Progress."""
        clock: StageClock | None = None
        if name in self._stages:
            clock, task = self._stages.pop(name)
            self._bars.remove_task(task)
        self._line(closing_line(name, clock, seconds=seconds, reused=reused), style="dim" if reused else "")

    def note(self, text: str) -> None:
        """See Progress."""
        self._line(f"warning: {text}", style="yellow")

    def tell(self, text: str) -> None:
        """See Progress."""
        self._line(text, style="")

    def _line(self, text: str, *, style: str) -> None:
        self._bars.console.print(Text(text, style=style))


class _TimeLeft(ProgressColumn):
    """Time left by the stage's own estimate."""

    def render(self, task: Task) -> Text:
        clock: StageClock = task.fields["clock"]
        left = clock.seconds_left()
        return Text("" if left is None else f"{shown_seconds(left)} left", style="cyan")


@contextmanager
def open_progress(*, as_json: bool, environment: Mapping[str, str] = os.environ) -> Iterator[Progress]:
    """Yield what fits stderr: JSON lines if asked for, bars on a terminal, plain lines elsewhere."""
    console = Console(stderr=True)
    if as_json:
        yield JsonlProgress(sys.stderr)
    elif console.is_terminal and not console.is_dumb_terminal and not environment.get("CI"):
        with Bars(*RichProgress.columns(), console=console, transient=True) as bars:
            yield RichProgress(bars)
    else:
        yield PlainProgress(sys.stderr)


def _counted(number: int, unit: str) -> str:
    return f"{number} {unit}" if number == 1 else f"{number} {'passes' if unit == 'pass' else unit + 's'}"
