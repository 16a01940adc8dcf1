"""One row: a peer run in its environment, its bits counted, its dense weights scored."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.peers.environments import Interpreter
from benchmarks.peers.exchange import DENSE, PACKED, Request, Result, last_line, read_result, write_request
from benchmarks.peers.scoring import Ruler
from benchmarks.peers.stored_bits import all_in_bits, check_levels, weights_of

ROOT = Path(__file__).parents[2]
LOG = "log.txt"
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "DO_NOT_TRACK": "1"}
"""Nothing is looked up or told: model and tokens are files."""


class PeerError(Exception):
    """A row that could not be made; the text is the last line of what went wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table."""

    peer: str
    bits: int
    target_bits: float
    """All-in bits that were asked for, with one scale of 16 bits a group and nothing else."""
    all_in_bits: float | None = None
    perplexity: float | None = None
    perplexity_reference: float | None = None
    kl_nats: float | None = None
    kl_standard_error: float | None = None
    seconds: float | None = None
    peak_bytes: int | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    failed: str | None = None
    """Why there are no figures."""


def run_peer(request: Request, module: str, interpreter: Interpreter, *, limit_seconds: float | None) -> Result:
    """Run a peer in a folder of its own; what it prints is kept there.

    Raises:
        PeerError: it failed, or took longer than the limit.
    """
    folder = Path(request.output)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    path = folder / "request.json"
    write_request(request, path)
    log = folder / LOG
    try:
        with log.open("w", encoding="utf-8") as written:
            done = subprocess.run(
                [str(interpreter.python), "-m", module, str(path)],
                stdout=written,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=_variables(request, interpreter),
                timeout=limit_seconds,
            )
    except subprocess.TimeoutExpired as error:
        raise PeerError(f"stopped after {limit_seconds:.0f} s") from error
    if done.returncode:
        killed = f"ended by signal {-done.returncode} after: " if done.returncode < 0 else ""
        raise PeerError(killed + last_line(log.read_text(encoding="utf-8", errors="replace")))
    return read_result(folder)


def _variables(request: Request, interpreter: Interpreter) -> dict[str, str]:
    variables = {**os.environ, **OFFLINE}
    variables["PYTHONPATH"] = os.pathsep.join([*interpreter.path, str(ROOT)])
    if not request.device.startswith("cuda"):
        variables["CUDA_VISIBLE_DEVICES"] = ""  # some peers take a GPU wherever they see one
    return variables


def measured_row(request: Request, result: Result, ruler: Ruler) -> Row:
    """Count and score what a peer made, then let go of its files but the result and what it printed.

    Raises:
        RulerError: it failed.
        ValueError: what was stored is not what was quantized, or not what is scored.
    """
    folder, model = Path(request.output), Path(request.model)
    weights = weights_of(model, result.modules)
    bits = all_in_bits(folder / PACKED, weights)
    check_levels(folder / PACKED, folder / DENSE, weights)
    found = ruler.score(model, folder / DENSE)
    for made in (PACKED, DENSE):
        shutil.rmtree(folder / made)
    return Row(
        peer=request.peer,
        bits=request.bits,
        target_bits=target_bits(request),
        all_in_bits=bits,
        perplexity=found["perplexity"],
        perplexity_reference=found["perplexity_reference"],
        kl_nats=found["kl_nats_per_token"],
        kl_standard_error=found["kl_standard_error"],
        seconds=result.seconds,
        peak_bytes=result.peak_bytes,
        settings=result.settings,
        versions=result.versions,
    )


def target_bits(request: Request) -> float:
    return request.bits + 16 / request.group_size
