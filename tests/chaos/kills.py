"""One row of the matrix: a run, a kill at a moment of one of its stages, what came of it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import psutil

from .services import BUCKET, Cluster, PrefectServer, S3Server

STAGES = ("profile", "candidates", "refine", "assemble")
AWAY_SECONDS = 4.0
"""How long a server that was killed stays away."""
RUN_SECONDS = 420.0
MOST_ATTEMPTS = 2
LAYERS = 8
BLOCKS_BETWEEN_WAYPOINTS = 3
PATIENCE = 3.0


class Kind(Enum):
    """What is killed."""

    WORKER = "worker -9"
    NODE = "node -9"
    DRIVER = "driver -9"
    S3 = "S3 server -9 and back"
    PREFECT = "Prefect server -9 and back"
    DISK = "spill disk full"
    STOP = "worker SIGSTOP"


@dataclass(kw_only=True)
class Field:
    """Where runs happen."""

    folder: Path
    model: Path
    s3: S3Server
    prefect: PrefectServer
    cluster: Cluster
    undisturbed: dict[str, bytes] = field(default_factory=dict)
    units: dict[str, int] = field(default_factory=dict)
    """Stage -> units that an undisturbed run reports."""
    workers: int = 2

    def command(self, name: str, *, store: str | None = None, settings: str = "") -> list[str]:
        """The command of a run with a store and an output of its own."""
        file = self.folder / f"{name}.toml"
        file.write_text(f"[run]\nshards = 4\nmicro_batch = 2\n[cluster]\npatience = {PATIENCE}\n{settings}")
        options = {
            "--budget": "3.5",
            "--bits": "2,3,4,6",
            "--output": str(self.folder / "out" / name),
            "--store": store or f"s3://{BUCKET}/{name}",
            "--calibration": "pydoc:calibrate",
            "--calibration-windows": "6",
            "--length": "48",
            "--workers": str(self.workers),
            "--device": "cpu",
            "--config": str(file),
            "--address": self.cluster.address,
        }
        flat = [part for pair in options.items() for part in pair]
        return ["compress", str(self.model), "--no-control", "--no-evaluate", "--json", *flat]


@dataclass(kw_only=True)
class Attempt:
    """One execution of the command."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.err.splitlines() if line.startswith('{"event"')]

    def units(self, stage: str) -> int:
        return sum(e["event"] == "advance" and e["name"] == stage for e in self.events)


ABORT_CHARS = 8000
"""Shown of what a driver said that ended by a signal."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What came of a kill."""

    kind: str
    stage: str
    moment: str
    killed: bool
    completed: str
    """"by itself" or "same command again"."""
    exit_codes: tuple[int, ...]
    message: str
    """What the first attempt said in the end, if it failed."""
    redone: int
    """Units of the stage that were reported done and were done again."""
    bound: int
    identical: bool
    seconds: float

    @property
    def passed(self) -> bool:
        return self.killed and self.identical and self.redone <= self.bound and self.exit_codes[-1] == 0


def execute(
    command: list[str], *, on_event: Callable[[dict[str, Any], subprocess.Popen[str]], None] | None = None
) -> Attempt:
    """Run ``lrpq``; ``on_event`` sees its events as they come."""
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    out: list[str] = []
    stdout = process.stdout
    reader = threading.Thread(target=lambda: out.append(stdout.read()))
    reader.start()
    timer = threading.Timer(RUN_SECONDS, process.kill)
    timer.start()
    lines: list[str] = []
    try:
        for line in process.stderr:
            lines.append(line)
            if on_event is not None and line.startswith('{"event"'):
                on_event(json.loads(line), process)
        code = process.wait()
    finally:
        timer.cancel()
        reader.join()
        process.stdout.close()
        process.stderr.close()
    return Attempt(code=code, out="".join(out), err="".join(lines), seconds=time.monotonic() - started)


def contents(folder: Path) -> dict[str, bytes]:
    """Files of a checkpoint whose bytes are promised."""
    names = ("*.safetensors", "config.json")
    return {path.name: path.read_bytes() for name in names for path in sorted(folder.glob(name))}


def undisturbed(field_: Field) -> Attempt:
    """A run that nothing happens to: its bytes and its units."""
    done = execute(field_.command("undisturbed"))
    if done.code != 0:
        raise RuntimeError(f"the undisturbed run failed: {done.err[-2000:]}")
    field_.undisturbed = contents(field_.folder / "out" / "undisturbed")
    field_.units = {stage: done.units(stage) for stage in STAGES}
    return done


def kill(field_: Field, kind: Kind, stage: str, *, seed: int, said: list[str]) -> Row:
    """A run with one kill at a moment that the seed decides, and the same command again if it did not survive.

    What was printed is added to ``said``.
    """
    rng = random.Random(f"{kind.name} {stage} {seed}")
    name = f"{kind.name.lower()}-{stage}-{seed}"
    after, delay = rng.randrange(field_.units[stage]), rng.random() * 0.4
    done: list[str] = []
    back: list[threading.Thread] = []
    lost: list[Any] = []
    seen = 0

    def strike(process: subprocess.Popen[str]) -> None:
        time.sleep(delay)
        if kind is Kind.DRIVER:
            process.kill()
        elif kind in (Kind.WORKER, Kind.STOP):
            victims = field_.cluster.workers()
            if not victims:
                return
            victims[rng.randrange(len(victims))].send_signal(signal.SIGKILL if kind is Kind.WORKER else signal.SIGSTOP)
        elif kind is Kind.NODE:
            node = field_.cluster.nodes[rng.randrange(len(field_.cluster.nodes))]
            field_.cluster.kill(node)
            lost.append(node)
        elif kind in (Kind.S3, Kind.PREFECT):
            service = field_.s3 if kind is Kind.S3 else field_.prefect
            service.kill()
            back.append(threading.Thread(target=_service_back, args=(service,)))
        for thread in back:
            thread.start()
        done.append(kind.value)

    def on_event(event: dict[str, Any], process: subprocess.Popen[str]) -> None:
        nonlocal seen
        if event.get("name") != stage or done:
            return
        if event["event"] == "advance":
            seen += 1
        if seen >= after and event["event"] in ("stage", "advance"):
            strike(process)

    with _disk(field_, name) if kind is Kind.DISK else contextlib.nullcontext("") as settings:
        if kind is Kind.DISK:
            done.append(kind.value)
        command = field_.command(name, settings=settings)
        attempts = [execute(command, on_event=on_event)]
    for thread in back:
        thread.join()
    for node in lost:  # another machine comes only when the run is over: it went on with what was left
        field_.cluster.nodes.append(field_.cluster.add(1))
        field_.cluster.tidy(node)
    _resume_stopped(field_)
    while attempts[-1].code != 0 and len(attempts) < MOST_ATTEMPTS:
        attempts.append(execute(field_.command(name)))
    said.extend(text for attempt in attempts for text in (attempt.out, attempt.err))
    if attempts[0].code < 0 and kind is not Kind.DRIVER:  # nobody has killed it
        print(f"the driver ended by signal {-attempts[0].code}:\n{attempts[0].err[-ABORT_CHARS:]}", file=sys.stderr)
    last = attempts[0].err.strip().splitlines()[-1] if attempts[0].code and attempts[0].err.strip() else ""
    redone = max(sum(attempt.units(stage) for attempt in attempts) - field_.units[stage], 0)
    streams = stage in ("profile", "refine")
    return Row(
        kind=kind.value,
        stage=stage,
        moment=f"{after} of {field_.units[stage]} + {delay:.2f} s",
        killed=bool(done),
        completed="by itself" if len(attempts) == 1 else "same command again",
        exit_codes=tuple(attempt.code for attempt in attempts),
        message="" if last.startswith('{"event"') else last[:300],
        redone=redone,
        bound=BLOCKS_BETWEEN_WAYPOINTS + 2 if streams else 1,
        identical=contents(field_.folder / "out" / name) == field_.undisturbed,
        seconds=sum(attempt.seconds for attempt in attempts),
    )


def _service_back(service: S3Server | PrefectServer) -> None:
    time.sleep(AWAY_SECONDS)
    service.start()


def _resume_stopped(field_: Field) -> None:
    """Whatever is still stopped would be a leak: the run should have ended it."""
    for process in field_.cluster.workers():
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() == psutil.STATUS_STOPPED:
                process.kill()


@contextlib.contextmanager
def _disk(field_: Field, name: str) -> Iterator[str]:
    """A small file system for spilled inputs: a tmpfs where one can be mounted."""
    place = field_.folder / "disks" / name
    place.mkdir(parents=True)
    small = 320 if name.endswith("profile-0") else 16  # KiB: some of the blocks fit, or not even K of them
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={small}k", "tmpfs", place], check=False)
    if mounted.returncode != 0:
        raise RuntimeError("a full disk needs the right to mount a tmpfs")
    try:
        yield f'kept_bytes = 0\nspill_folder = "{place}"\n'
    finally:
        subprocess.run(["umount", "-l", place], check=False)


def fresh(folder: Path) -> Path:
    """The folder, empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.chmod(folder, 0o755)
    return folder
