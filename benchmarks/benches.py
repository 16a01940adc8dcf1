"""What benchmarks of language models begin with: windows of two texts, and a workbench on one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoTokenizer

from lrpq.compare.terms import Terms
from lrpq.compare.workbench import Workbench
from lrpq.model.source import open_source
from tasks.calibration.held_out import default_held_out, split_held_out
from tasks.calibration.load import load_windows
from tasks.calibration.sources import parse_source
from tasks.resources import cut_of

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchTerms:
    """Terms that are the same for all seeds."""

    model: Path
    calibration: Path
    """Text to calibrate on."""
    windows: int
    """Of it, beside those held out."""
    length: int
    """Tokens of a window."""
    bits: tuple[int, ...]
    group_sizes: tuple[int, ...]
    scale_bits: int
    device: str
    trellis: bool = False
    micro_batch: int | None = None
    """Windows at once; None as `lrpq compress` chooses."""


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers between commas."""
    return tuple(int(part) for part in text.split(","))


def budgets(text: str) -> Sequence[float]:
    """Bits between commas."""
    return [float(part) for part in text.split(",")]


def spread_windows(model: Path, text: Path, *, number: int, length: int) -> Int[Tensor, "windows length"]:
    """Windows spread over a text, as results are measured on."""
    return load_windows(
        parse_source(f"text:{text}"),
        AutoTokenizer.from_pretrained(model),
        num_windows=number,
        length=length,
        seed=0,
        placement="spread",
    ).tokens


def workbench(terms: BenchTerms, *, seed: int) -> tuple[Workbench, Int[Tensor, "held_out length"]]:
    """A workbench on windows that the seed draws, and those of the same text that are held out."""
    drawn = load_windows(
        parse_source(f"text:{terms.calibration}"),
        AutoTokenizer.from_pretrained(terms.model),
        num_windows=terms.windows + default_held_out(terms.windows),
        length=terms.length,
        seed=seed,
    )
    calibration, held_out = split_held_out(drawn, num_windows=terms.windows)
    source = open_source(terms.model)
    cut = cut_of(
        device=terms.device,
        num_windows=len(calibration.tokens),
        length=terms.length,
        hidden=source.config.hidden_size,
        micro_batch=terms.micro_batch,
    )
    of_bench = Terms(
        bits=terms.bits,
        group_sizes=terms.group_sizes,
        scale_bits=terms.scale_bits,
        trellis=terms.trellis,
        seed=seed,
        device=terms.device,
        shards=cut.shards,
        micro_batch=cut.micro_batch,
    )
    return Workbench(source, calibration.tokens, of_bench, held_out=held_out), held_out
