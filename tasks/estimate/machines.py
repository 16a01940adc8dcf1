"""Machines: this one, measured in about a minute and stored, and kinds of GPU that were measured elsewhere."""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from importlib.resources import files
from pathlib import Path

import psutil
import torch

from lrpq.errors import ConfigError
from lrpq.plan.machine import Machine, measured_rates
from tasks.estimate.idle import idle_bytes
from tasks.store.documents import document_bytes, parse_document, plain_json, sha256_text
from tasks.store.keys import environment_fingerprint
from tasks.store.local import LocalStore
from tasks.store.tensors import read_symmetric, read_tensors, write_symmetric, write_tensors

KIND = "machine"
DISK_BYTES = 256 << 20
MATRIX = 3072
REPEATS = 3


def calibrated(threads: int, folder: Path, *, say: Callable[[str], None] = lambda text: None) -> Machine:
    """This machine, measured now: rates of one worker of so many threads.

    Args:
        threads: of a worker.
        folder: on the disk that is measured.
        say: told what is being measured.

    Raises:
        ConfigError: the folder cannot be written.
    """
    processor = environment_fingerprint("cpu", threads=threads)["device"]
    before = torch.get_num_threads()
    started = time.monotonic()
    torch.set_num_threads(threads)
    try:
        rates = measured_rates("cpu", say=say)
    finally:
        torch.set_num_threads(before)
    say("disk and store")
    rates |= _disk(folder)
    say("an idle worker")
    return Machine(
        name=platform.node() or "this machine",
        device="cpu",
        threads=threads,
        rates=rates,
        process_bytes=idle_bytes(threads),
        host_bytes=int(psutil.virtual_memory().total),
        source=f"measured in {time.monotonic() - started:.0f} s on {processor}",
    )


def machine_file(folder: Path, threads: int) -> Path:
    """Where the measurement of this machine with these libraries is stored."""
    identity = sha256_text(json.dumps(environment_fingerprint("cpu", threads=threads), sort_keys=True))
    return folder / f"machine-{identity[:12]}.json"


def write_machine(path: Path, machine: Machine) -> None:
    """Store a machine.

    Raises:
        ConfigError: the file cannot be written.
    """
    body = {name: plain_json(value) for name, value in asdict(machine).items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(document_bytes(KIND, body, key=path.name))
    except OSError as error:
        raise ConfigError(f"machine {path}: cannot be written ({error.strerror}); set XDG_CACHE_HOME") from error


def read_machine(path: Path) -> Machine:
    """A stored machine.

    Raises:
        ConfigError: no such file, or not one of ours.
    """
    try:
        return _machine(parse_document(path.read_bytes(), KIND, key=path.name))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"machine {path}: cannot be read ({error}); measure again with lrpq plan --calibrate"
        ) from error


def known_gpu(name: str) -> Machine:
    """A kind of GPU whose rates come with lrpq.

    Raises:
        ConfigError: none of that name.
    """
    folder = files("tasks.estimate") / "gpus"
    known = sorted(path.name.removesuffix(".json") for path in folder.iterdir() if path.name.endswith(".json"))
    if name not in known:
        raise ConfigError(f"GPU {name!r}: known are {', '.join(known)}; give one of them, or --machine FILE")
    return _machine(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))


def _machine(body: Mapping[str, object]) -> Machine:
    found = Machine(**body)  # type: ignore[arg-type]
    return replace(found, assumed=tuple(found.assumed))


def _disk(folder: Path) -> dict[str, float]:
    """Bytes a second of plain files and of the store, which hashes what it writes and reads."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="lrpq-calibrate-", dir=folder) as parent:
            return _disk_rates(Path(parent))
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error.strerror}); give another --store") from error


def _disk_rates(folder: Path) -> dict[str, float]:
    content = os.urandom(1 << 20) * (DISK_BYTES >> 20)
    path = folder / "plain"

    def write() -> None:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    rates = {"disk-write": DISK_BYTES / _fastest(write), "disk-read": DISK_BYTES / _fastest(path.read_bytes)}
    store = LocalStore.open_tested(folder / "store", url=str(folder / "store"))
    generator = torch.Generator().manual_seed(0)
    codes = {"codes": torch.randint(-(2**31), 2**31 - 1, (8 << 20,), generator=generator, dtype=torch.int64).int()}
    matrix = {"H": torch.randn(MATRIX, MATRIX, generator=generator)}
    count = iter(range(10 * REPEATS))
    seconds = _fastest(lambda: write_tensors(store, f"codes-{next(count)}", codes))
    matrices = _fastest(lambda: write_symmetric(store, f"matrix-{next(count)}", matrix))
    size = codes["codes"].numel() * 4
    stored = store.size(next(key for key in store.list() if key.startswith("matrix")))
    key = next(key for key in store.list() if key.startswith("codes"))
    other = next(key for key in store.list() if key.startswith("matrix"))
    read = _fastest(lambda: read_tensors(store, key))
    read_matrix = _fastest(lambda: read_symmetric(store, other, "H"))
    shutil.rmtree(folder / "store")
    return {
        **rates,
        "store-write": size / seconds,
        "store-read": size / read,
        "matrix-write": stored / matrices,
        "matrix-read": stored / read_matrix,
    }


def _fastest(action: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(REPEATS):
        started = time.perf_counter()
        action()
        best = min(best, time.perf_counter() - started)
    return best
