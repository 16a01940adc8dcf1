"""The process that reads mutated artefacts: it judges each case, and its parent sees where it hangs or dies.

Run as ``python -m tests.fuzz.child WORK``. It imports everything, writes ``ready`` and the readers' names, and forks
for every line ``READER FIRST COUNT`` on its standard input. Further lines of its output: ``P pid`` of the fork,
``S seed`` before a case, ``R seed OUTCOME text`` after it, ``X status`` when the fork is gone.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from lrpq.errors import LrpqError

from . import broken, readers
from .mutators import Files, Link, mutate
from .readers import Found, Reader
from .values import OUTSIDE

READERS = {reader.name: reader for reader in (*readers.READERS, *broken.READERS)}
MIB = 1 << 20
ADDRESS_SPACE = 4096 * MIB
"""Far more than a case may use, so that one that uses more is seen, but cannot take the machine down."""
ALLOWED_BYTES = 64 * MIB
ALLOWED_RATIO = 10
"""A case may use this much memory, and this many times its own size."""
CPU_SECONDS = 900
"""Of a batch, for the case that the parent dies and nobody ends a fork that hangs."""
NO_MEMORY = re.compile(r"bad_alloc|can.t allocate|out of memory", re.IGNORECASE)
CANARY = b"a value from outside the folder "
SAME, CHANGED, REFUSED, FAILED = "same", "changed", "refused", "failed"


class Place:
    """Folders of one process: the artefact that is read, and beside it what must not be touched."""

    def __init__(self, work: Path, names: Iterable[str]) -> None:
        self.case = work / "case"
        self.outside = work / "outside"
        self.outside.mkdir(parents=True)
        for name in names:  # which links point to
            (self.outside / name).parent.mkdir(exist_ok=True)
            (self.outside / name).write_bytes(CANARY * 2)
        header = {"canary": {"dtype": "F32", "shape": [len(CANARY) // 4], "data_offsets": [0, len(CANARY)]}}
        text = json.dumps(header).encode()
        for name in ("canary.safetensors", "model.safetensors"):
            (self.outside / name).write_bytes(len(text).to_bytes(8, "little") + text + CANARY)

    def state(self) -> list[tuple[str, int, int]]:
        """What is there: path, length and time of change."""
        found = []
        for top in (self.case, self.outside):
            for folder, folders, names in os.walk(top):
                for name in (*folders, *names):
                    stat = os.lstat(os.path.join(folder, name))
                    found.append((os.path.join(folder, name), stat.st_size, stat.st_mtime_ns))
        return sorted(found)


def fill(folder: Path, files: Files) -> None:
    """Make a folder hold exactly these files."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if isinstance(content, Link):
            path.symlink_to(content.target)
        else:
            path.write_bytes(content)


class Opened:
    """Which files Python opens while a case runs, through an audit hook (which cannot be removed again)."""

    def __init__(self, place: Place) -> None:
        self.seen: list[str] = []
        self.active = False
        self._outside = str(place.outside)
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" or not self.active or not isinstance(arguments[0], str | bytes):
            return
        path = os.path.normpath(os.path.abspath(os.fsdecode(arguments[0])))
        flags = arguments[2] if isinstance(arguments[2], int) else 0
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes or path.startswith((self._outside, OUTSIDE)) or path == "/etc/passwd":
            self.seen.append(path)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a case."""

    outcome: str
    text: str


class Judge:
    """Reads artefacts of one reader and says what went wrong."""

    def __init__(self, reader: Reader, corpus: list[Files], place: Place) -> None:
        self.reader = reader
        self.corpus = corpus
        self.place = place
        self.expected: list[Found] = []
        for files in corpus * 2:  # the second time, everything that is imported on the way has been
            fill(place.case, files)
            self.expected.append(reader.read(place.case))
        self.opened = Opened(place)
        resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + ADDRESS_SPACE, resource.RLIM_INFINITY))

    def judge(self, which: int, files: Files) -> Verdict:
        """Read a mutated artefact."""
        fill(self.place.case, files)
        before = self.place.state()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        resident = _status("VmRSS")
        self.opened.seen.clear()
        self.opened.active = True
        try:
            verdict = self._read(which)
        finally:
            self.opened.active = False
        used = _status("VmHWM") - resident
        limit = ALLOWED_BYTES + ALLOWED_RATIO * sum(len(raw) for raw in files.values() if isinstance(raw, bytes))
        if used > limit:
            return Verdict(FAILED, f"used {used // MIB} MiB: {verdict.text}")
        if self.opened.seen:
            return Verdict(FAILED, f"opened {self.opened.seen[0]}: {verdict.text}")
        if self.place.state() != before:
            return Verdict(FAILED, f"files were changed: {verdict.text}")
        return verdict

    def _read(self, which: int) -> Verdict:
        try:
            found = self.reader.read(self.place.case)
        except LrpqError as error:
            return self._refusal(error)
        except Exception:  # noqa: BLE001 -- that is what is looked for
            return Verdict(FAILED, traceback.format_exc())
        if any(readers.digest(CANARY) in text or CANARY.decode() in text for text in found.values()):
            return Verdict(FAILED, "what lies outside the folder was read")
        if found == self.expected[which]:
            return Verdict(SAME, "")
        if self.reader.protected:
            return Verdict(FAILED, f"changed content was accepted: {found} instead of {self.expected[which]}")
        return Verdict(CHANGED, "")

    def _refusal(self, error: LrpqError) -> Verdict:
        message = str(error)
        if not message.isprintable():
            return Verdict(FAILED, f"the message is no printable line: {message!r}")
        if CANARY.decode() in message:
            return Verdict(FAILED, f"the message shows what lies outside: {message}")
        if self.reader.names_file and not any(name in message for name in (str(self.place.case), *self.reader.roles)):
            return Verdict(FAILED, f"the message names no file: {message}")
        link: BaseException | None = error
        for _ in range(20):
            if isinstance(link, pa.ArrowMemoryError):
                # Parquet's reader takes what a page or a footer claims from the allocator and fails before it
                # touches it: no memory is used, however large the claim.
                pass
            elif link is not None and (isinstance(link, MemoryError) or NO_MEMORY.search(str(link))):
                return Verdict(FAILED, f"asked for too much memory: {''.join(traceback.format_exception(error))}")
            link = link and (link.__cause__ or link.__context__)
        return Verdict(REFUSED, f"{type(error).__name__}: {message}")


def mutated(reader: Reader, corpus: list[Files], seed: int) -> tuple[int, Files]:
    """The artefact of a case, and which of the corpus it was."""
    rng = random.Random(f"{reader.name} {seed}")
    which = rng.randrange(len(corpus))
    return which, mutate(corpus[which], reader.roles, rng, links=reader.links)


def write_case(folder: Path, name: str, seed: int) -> None:
    """Write the artefact of a case, to look at it."""
    with tempfile.TemporaryDirectory() as work:
        _, files = mutated(READERS[name], load_corpus(Path(work), READERS[name]), seed)
    fill(folder, files)


def _status(name: str) -> int:
    """A size of this process (bytes): VmRSS is the memory in use now, VmHWM its peak, VmSize the address space."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return int(found[1]) * 1024


def load_corpus(folder: Path, reader: Reader) -> list[Files]:
    """The valid artefacts of a reader; written once for all processes."""
    corpus: list[Files] = []
    for number, write in enumerate(reader.write):
        place = folder / reader.name / str(number)
        if not place.exists():
            place.mkdir(parents=True)
            write(place)
        paths = sorted(path for path in place.rglob("*") if path.is_file())
        corpus.append({str(path.relative_to(place)): path.read_bytes() for path in paths})
        assert reader.roles.keys() <= corpus[-1].keys(), f"{reader.name} has no file {reader.roles} in {place}"
    return corpus


def run_batch(work: Path, name: str, first: int, count: int, report: int) -> None:
    """Judge ``count`` cases; a line to the file descriptor ``report`` before and after each.

    None at all writes the corpus.
    """
    reader = READERS[name]
    corpus = load_corpus(work / "corpus", reader)
    if not count:
        return
    own = work / str(os.getpid())
    place = Place(own, reader.roles)
    os.chdir(own)  # where OUTSIDE is
    judge = Judge(reader, corpus, place)
    for seed in range(first, first + count):
        which, files = mutated(reader, corpus, seed)
        os.write(report, f"S {seed}\n".encode())
        verdict = judge.judge(which, files)
        text = json.dumps(verdict.text.replace(str(own), "WORK")) if verdict.outcome == FAILED or count == 1 else '""'
        os.write(report, f"R {seed} {verdict.outcome} {text}\n".encode())
    shutil.rmtree(own, ignore_errors=True)


def main() -> None:
    """Serve requests until the input ends."""
    work = Path(sys.argv[1])
    report = os.dup(1)
    os.dup2(os.open(work / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    os.write(report, f"ready {' '.join(reader.name for reader in readers.READERS)}\n".encode())
    for line in sys.stdin:
        name, first, count = line.split()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                run_batch(work, name, int(first), int(count), report)
                status = 0
            except BaseException:  # noqa: BLE001 -- told to the parent by the status
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(status)
        os.write(report, f"P {pid}\n".encode())
        _, status = os.waitpid(pid, 0)
        os.write(report, f"X {status}\n".encode())


if __name__ == "__main__":
    main()
