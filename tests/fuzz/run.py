"""Fuzz the readers: ``python -m tests.fuzz.run [--cases N] [--reader NAME ...] [--first SEED] [--timeout SECONDS]``.

A case is a reader and a seed, nothing else: ``--reader NAME --first SEED --cases 1`` runs it again and shows what came
of it; with ``--files FOLDER`` the mutated artefact is kept. Exits with 1 if a case failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

MEMORY = "/dev/shm"  # artefacts are written and removed thousands of times a second
ROOT = Path(__file__).parents[2]
BATCH = 500
"""Cases of one process: enough to pay for starting it, few enough that what one leaves behind does not add up."""
TIMEOUT_SECONDS = 20.0
"""Of one case, which takes milliseconds; a machine may be busy."""
START_SECONDS = 120.0
SHOWN_FAILURES = 10
MAX_SHOWN = 4000  # characters of a failure
FAILED = "failed"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "ARROW_DEFAULT_MEMORY_POOL": "system",  # others reserve address space in large pieces, which hides allocations
    "MALLOC_ARENA_MAX": "1",  # as does an arena for each thread
    "PYTHONDONTWRITEBYTECODE": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(slots=True)
class Result:
    """What came of the cases of one reader."""

    reader: str
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[int, str]] = field(default_factory=list)
    """Seed and what went wrong."""
    texts: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def cases(self) -> int:
        """Cases that were judged."""
        return self.outcomes.total()

    def add(self, seed: int, outcome: str, text: str) -> None:
        """Count a case."""
        self.outcomes[outcome] += 1
        if outcome == FAILED:
            self.failures.append((seed, text))
        if text:
            self.texts.append(text)

    def report(self) -> str:
        """Failures, each with the command that repeats it."""
        alike: dict[str, list[tuple[int, str]]] = {}
        for seed, text in self.failures:
            alike.setdefault(_signature(text), []).append((seed, text.rstrip()))
        lines = [
            f"{self.reader}, seed {group[0][0]} and {len(group) - 1} like it: {group[0][1][:MAX_SHOWN]}\n"
            f"  again: python -m tests.fuzz.run --reader {self.reader} --first {group[0][0]} --cases 1"
            for group in list(alike.values())[:SHOWN_FAILURES]
        ]
        return "\n".join([f"{len(self.failures)} of {self.cases} cases of {self.reader} failed", *lines])


class Fuzzer:
    """The process that reads, which is killed and replaced when a case hangs or kills it."""

    def __init__(self, work: Path, *, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        self.timeout_seconds = timeout_seconds
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.child", str(work)],
            cwd=ROOT,
            env={**os.environ, **ENVIRONMENT},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._log = work / "output.txt"
        self._unread = b""
        self._prepared: set[str] = set()
        ready, *self.names = (self._line(START_SECONDS) or "no answer").split()
        if ready != "ready":
            raise RuntimeError(f"the reading process did not start: {self._output()}")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()

    def run(self, reader: str, *, first: int, cases: int) -> Result:
        """Judge cases ``first`` to ``first + cases - 1``."""
        if reader not in self._prepared:
            self._batch(Result(reader), 0, 0)
            self._prepared.add(reader)
        result = Result(reader)
        began = time.monotonic()
        seed = first
        while seed < first + cases:
            seed = self._batch(result, seed, min(BATCH, first + cases - seed))
        result.seconds = time.monotonic() - began
        return result

    def _batch(self, result: Result, first: int, count: int) -> int:
        """One fork; returns the seed to go on with."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{result.reader} {first} {count}\n".encode())
        self._process.stdin.flush()
        pid, running, done, why = 0, None, first, ""
        while True:
            line = self._line(self.timeout_seconds if running is not None else START_SECONDS)
            if line is None:
                why = f"no answer within {self.timeout_seconds:g} s"
                assert pid, "no fork"  # zero would be this whole process group
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                continue
            kind, _, rest = line.partition(" ")
            if kind == "P":
                pid = int(rest)
            elif kind == "S":
                running = int(rest)
            elif kind == "R":
                _, outcome, text = rest.split(" ", 2)
                result.add(done, outcome, json.loads(text))
                done, running = done + 1, None
            elif running is not None:
                result.add(running, FAILED, why or f"the process ended with status {_status(int(rest))}")
                return running + 1
            elif int(rest):
                raise RuntimeError(f"the reading process failed outside of a case: {self._output()}")
            else:
                return done

    def _line(self, timeout_seconds: float) -> str | None:
        """The next line of the process; None if none comes in time."""
        assert self._process.stdout is not None
        while b"\n" not in self._unread:
            if not select.select([self._process.stdout], [], [], timeout_seconds)[0]:
                return None
            piece = os.read(self._process.stdout.fileno(), 1 << 16)
            if not piece:
                raise RuntimeError(f"the reading process is gone: {self._output()}")
            self._unread += piece
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode()

    def _output(self) -> str:
        return self._log.read_text(errors="replace")[-3000:] if self._log.exists() else ""


def _signature(text: str) -> str:
    """What failures of one cause have in common: where it was raised and of which type, else the first words."""
    places = re.findall(r'File "([^"]*/(?:lrpq|tasks|flows)/[^"]*)", line (\d+)', text)
    last = text.rstrip().splitlines()[-1]
    return f"{places[-1:]} {last.split(':')[0]}" if places else text[:40]


def _status(status: int) -> str:
    return f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else str(os.WEXITSTATUS(status))


@contextlib.contextmanager
def open_fuzzer(*, timeout_seconds: float = TIMEOUT_SECONDS) -> Iterator[Fuzzer]:
    """A fuzzer with a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="lrpq-fuzz-", dir=MEMORY if os.path.isdir(MEMORY) else None) as work:
        fuzzer = Fuzzer(Path(work), timeout_seconds=timeout_seconds)
        try:
            yield fuzzer
        finally:
            fuzzer.close()


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run", description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000, help="cases of each reader")
    parser.add_argument("--reader", action="append", metavar="NAME", help="only this reader (may be repeated)")
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--timeout", type=float, default=TIMEOUT_SECONDS, help="seconds of a case")
    parser.add_argument("--files", type=Path, metavar="FOLDER", help="write the mutated artefacts of --first there")
    options = parser.parse_args()
    if options.files is not None:
        from .child import write_case

        for name in options.reader or ():
            write_case(options.files / name, name, options.first)
    print(f"{'reader':20} {'cases':>7} {'same':>7} {'changed':>7} {'refused':>7} {'failed':>7} {'seconds':>8}")
    failed = False
    with open_fuzzer(timeout_seconds=options.timeout) as fuzzer:
        for name in options.reader or fuzzer.names:
            result = fuzzer.run(name, first=options.first, cases=options.cases)
            counts = " ".join(f"{result.outcomes[kind]:7}" for kind in ("same", "changed", "refused", FAILED))
            print(f"{name:20} {result.cases:7} {counts} {result.seconds:8.1f}", flush=True)
            if result.failures:
                failed = True
                print(result.report(), flush=True)
            elif options.cases == 1:
                print("\n".join(result.texts))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
