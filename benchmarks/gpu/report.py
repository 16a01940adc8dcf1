"""Rows, printed as they are measured and kept as JSON."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch

Figure = float | int | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceiling:
    """What the card does in this run, measured."""

    bf16: float
    """FLOP/s of a large bfloat16 product with float32 sums."""
    fp32: float
    tf32: float
    copy: float
    """Bytes read and written a second by a copy on the device."""
    to_host: float
    """Bytes a second to pinned host memory."""
    to_device: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measurement."""

    part: str
    name: str
    seconds: float = 0.0
    flops: float = 0.0
    """Necessary ones (flops.py), not those that were performed; 0 where none are counted."""
    bytes: float = 0.0
    """That memory has to move at least: inputs read once, outputs written once."""
    peak_bytes: int = 0
    blocks: int = 0
    """Of a whole block's stage: blocks of the model; the stage then counts towards the whole model."""
    figures: Mapping[str, Figure] = field(default_factory=dict)
    error: str = ""


class Report:
    """Prints rows and writes them to ``path`` after each.

    Args:
        device: of the run.
        path: JSON file, or None.
        earlier: files of earlier runs whose rows count towards the whole model too, where the device is the same.
    """

    def __init__(self, device: torch.device, path: Path | None = None, earlier: tuple[Path, ...] = ()) -> None:
        self.device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        self.date = datetime.now(UTC).isoformat(timespec="minutes")
        self.path = path
        self.ceiling: Ceiling | None = None
        self.rows: list[Row] = []
        self.earlier: list[Row] = []
        for file in earlier:
            found = json.loads(file.read_text(encoding="utf-8"))
            if found["device"] != self.device_name:
                raise SystemExit(f"--add {file}: measured on {found['device']}, this is {self.device_name}")
            self.earlier += [Row(**row) for row in found["rows"]]

    @property
    def failed(self) -> bool:
        """Whether something could not be measured."""
        return any(row.error for row in self.rows)

    def add(self, row: Row) -> None:
        """Print a row and write all."""
        self.rows.append(row)
        print(self.line(row), flush=True)
        if self.path is not None:
            found = {
                "device": self.device_name,
                "date": self.date,
                "arguments": sys.argv[1:],
                "torch": torch.__version__,
                "cuda": torch.version.cuda,
                "ceiling": None if self.ceiling is None else asdict(self.ceiling),
                "rows": [asdict(each) for each in self.rows],
            }
            self.path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    def attempt(self, part: str, name: str, action: Callable[[], None]) -> None:
        """Do it; an error is printed and makes a failed row, so that what follows is measured all the same."""
        try:
            action()
        except Exception as error:  # noqa: BLE001 (whatever a part or a peer raises)
            traceback.print_exc()
            lines = str(error).strip().splitlines() or [""]
            self.add(Row(part=part, name=name, error=f"{type(error).__name__}: {lines[0]}"))

    def say(self, text: str) -> None:
        """Print what is no measurement."""
        print(text, flush=True)

    def line(self, row: Row) -> str:
        """A row as text."""
        parts = [f"{row.part:10} {row.name:44}"]
        if row.error:
            return f"{parts[0]} FAILED: {row.error}"
        if row.seconds:
            parts.append(f"{row.seconds:9.4f} s")
        if row.flops and row.seconds:
            rate = row.flops / row.seconds
            parts.append(f"{row.flops / 1e12:9.3f} TFLOP {rate / 1e12:7.1f} TFLOP/s")
            if self.ceiling is not None:
                parts.append(f"{rate / self.ceiling.bf16:6.1%} of bf16 {rate / self.ceiling.fp32:6.1%} of fp32")
        if row.bytes and row.seconds:
            parts.append(f"{row.bytes / 1e9:7.2f} GB")
            if self.ceiling is not None:
                parts.append(f"{row.bytes / row.seconds / self.ceiling.copy:6.1%} of copy")
        if row.peak_bytes:
            parts.append(f"peak {row.peak_bytes / 1e9:.2f} GB")
        parts += [f"{name} {_text(value)}" for name, value in row.figures.items()]
        return "  ".join(parts)


def _text(value: Figure) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
