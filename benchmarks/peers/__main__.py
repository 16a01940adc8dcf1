"""lrpq, its control and other quantizers on the same calibration tokens, by one ruler.

    python -m benchmarks.peers MODEL --calibration FILE --text FILE [--windows 64] [--length 512] [--device cpu]
        [--only lrpq control llm-compressor gptqmodel auto-round auto-scheme] [--bits 3,4] [--group-size 64] [--seed 0]
        [--option auto-round:iterations=50 ...] [--ruler SCRIPT] [--wheels DIR] [--work DIR] [--json FILE]

The windows are drawn by lrpq's own loader and written once as token ids that every peer reads. Every peer runs in an
environment of its own below --work, made at its first use (environments.py), with its own defaults but for symmetric
groups of one size. It leaves its packed checkpoint, whose stored bytes are counted as all-in bits per quantized weight,
and its dequantized weights, which the ruler compares with the original. Seconds are those of quantizing, without
imports, loading and writing; peak memory is the process's until then, or what was allocated on the GPU.

A row is printed as soon as it is measured. A peer that fails is a row that says so, and the exit status is then 1.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import AutoTokenizer

from benchmarks.peers.environments import EnvironmentNotMade, Interpreter, environment, own_interpreter
from benchmarks.peers.exchange import Request, write_tokens
from benchmarks.peers.rows import LOG, PeerError, Row, measured_row, run_peer, target_bits
from benchmarks.peers.scoring import Ruler, RulerError, ruler_command
from benchmarks.peers.table import line, table
from tasks.calibration.held_out import default_held_out, split_held_out
from tasks.calibration.load import load_windows
from tasks.calibration.sources import parse_source


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """How a row is made."""

    module: str
    environment: str | None
    """None: the benchmark's own."""


PEERS = {
    "lrpq": Peer(module="ours", environment=None),
    "control": Peer(module="ours", environment=None),
    "llm-compressor": Peer(module="llm_compressor", environment="llm-compressor"),
    "auto-round": Peer(module="auto_round", environment="auto-round"),
    "auto-scheme": Peer(module="auto_scheme", environment="auto-round"),
    "gptqmodel": Peer(module="gptq_model", environment="gptqmodel"),
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--ruler", type=Path, help="a script instead of benchmarks/peers/ruler.py")
    parser.add_argument("--ruler-windows", type=int, default=32)
    parser.add_argument("--ruler-length", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--bits", default="3,4")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--option", action="append", default=[], metavar="PEER:NAME=VALUE")
    parser.add_argument("--wheels", type=Path, help="install peers from this folder alone, beside the interpreter's")
    parser.add_argument("--limit", type=float, help="seconds after which a peer is stopped")
    parser.add_argument("--work", type=Path, default=Path("results/peers"))
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def options_for(peer: str, options: Sequence[str]) -> dict[str, str]:
    """The ``NAME=VALUE`` of a peer.

    Raises:
        SystemExit: an option that is written otherwise, or of a peer that does not exist.
    """
    found = {}
    for option in options:
        whose, _, assignment = option.partition(":")
        name, equals, value = assignment.partition("=")
        if whose not in PEERS or not name or not equals:
            raise SystemExit(f"--option {option}: expected PEER:NAME=VALUE with one of {', '.join(PEERS)}")
        if whose == peer:
            found[name] = value
    return found


def write_calibration(arguments: argparse.Namespace, path: Path) -> None:
    """Draw the windows that ``lrpq compress`` would calibrate on."""
    drawn = load_windows(
        parse_source(f"text:{arguments.calibration}"),
        AutoTokenizer.from_pretrained(arguments.model),
        num_windows=arguments.windows + default_held_out(arguments.windows),
        length=arguments.length,
        seed=arguments.seed,
    )
    write_tokens(path, split_held_out(drawn, num_windows=arguments.windows)[0].tokens)


def interpreter_of(peer: Peer, arguments: argparse.Namespace) -> Interpreter:
    """The interpreter of a peer's environment, made where it is not there yet."""
    if peer.environment is None:
        return own_interpreter()
    return environment(peer.environment, arguments.work / "environments", wheels=arguments.wheels)


def row_of(request: Request, ruler: Ruler, arguments: argparse.Namespace) -> Row:
    """Make and measure a row; a failure is a row too."""
    peer = PEERS[request.peer]
    try:
        result = run_peer(
            request,
            f"benchmarks.peers.{peer.module}",
            interpreter_of(peer, arguments),
            limit_seconds=arguments.limit,
        )
        return measured_row(request, result, ruler)
    except (EnvironmentNotMade, PeerError, RulerError, ValueError, OSError) as error:
        return Row(peer=request.peer, bits=request.bits, target_bits=target_bits(request), failed=str(error))


def main() -> None:
    arguments = parse()
    work = arguments.work = arguments.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    tokens = work / "tokens.safetensors"
    write_calibration(arguments, tokens)
    ruler = Ruler(
        command=ruler_command(arguments.ruler),
        text=arguments.text.absolute(),
        windows=arguments.ruler_windows,
        length=arguments.ruler_length,
        device=arguments.device,
    )
    rows: list[Row] = []
    for peer in arguments.only:
        for bits in (int(text) for text in arguments.bits.split(",")):
            request = Request(
                peer=peer,
                model=str(arguments.model.absolute()),
                tokens=str(tokens),
                output=str(work / f"{peer}-{bits}"),
                bits=bits,
                group_size=arguments.group_size,
                device=arguments.device,
                seed=arguments.seed,
                options=options_for(peer, arguments.option),
            )
            rows.append(row_of(request, ruler, arguments))
            print(line(rows[-1]), flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")
    print(f"\n{table(rows)}", flush=True)
    if any(row.failed is not None for row in rows):
        raise SystemExit(f"what the peers printed: {work}/PEER-BITS/{LOG}")


if __name__ == "__main__":
    main()
