"""A checkpoint scored against its original by a script in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.exchange import last_line

ROOT = Path(__file__).parents[2]


class RulerError(Exception):
    """Why a checkpoint could not be scored; the text is the last line of what the script printed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ruler:
    """A script, or a module, that prints one JSON line for REFERENCE CHECKPOINT --text --windows --length --device."""

    command: tuple[str, ...]
    text: Path
    windows: int
    length: int
    device: str

    def score(self, model: Path, checkpoint: Path) -> dict[str, float]:
        """What it prints.

        Raises:
            RulerError: it failed.
        """
        done = subprocess.run(
            [
                *(*self.command, str(model), str(checkpoint), "--text", str(self.text)),
                *("--windows", str(self.windows), "--length", str(self.length), "--device", self.device),
            ],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        if done.returncode:
            raise RulerError(f"ruler: {last_line(done.stderr)}")
        found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
        return found


def ruler_command(script: Path | None) -> tuple[str, ...]:
    """How a script is started; without one, the ruler of this package."""
    return (
        (sys.executable, "-m", "benchmarks.peers.ruler") if script is None else (sys.executable, str(script.absolute()))
    )
