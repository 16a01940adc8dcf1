"""``python -m tests.chaos.shapes``: 1, 2 and 4 workers on 1 and 3 nodes, and two drivers of one run: the same bytes."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .field import model_in
from .kills import LAYERS, Attempt, Field, contents, execute, fresh
from .leaks import leaks
from .services import running

NODES = {1: [4], 3: [2, 1, 1]}


def digest(files: dict[str, bytes]) -> str:
    """Of a checkpoint's files, short."""
    whole = hashlib.sha256()
    for name, content in sorted(files.items()):
        whole.update(name.encode() + b"\0" + content)
    return whole.hexdigest()[:16]


def two_drivers(field: Field) -> list[Attempt]:
    """The same command twice at once: one store, one run id, one output."""
    field.workers = 1
    command = field.command("together")
    with ThreadPoolExecutor(2) as drivers:
        return list(drivers.map(execute, [command, command]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, nargs="*", default=list(NODES), choices=list(NODES))
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2, 4])
    asked = parser.parse_args()
    digests: dict[str, str] = {}
    texts: list[str] = []
    found: list[str] = []
    clean = True
    print("| run | exit | seconds | checkpoint |\n|---|---|---|---|")

    def show(name: str, attempt: Attempt, files: dict[str, bytes]) -> None:
        nonlocal clean
        texts.extend((attempt.out, attempt.err))
        clean &= attempt.code == 0
        digests[name] = digest(files)
        print(f"| {name} | {attempt.code} | {attempt.seconds:.0f} | {digests[name]} |", flush=True)
        if attempt.code:
            print(attempt.err[-1500:])

    for nodes in asked.nodes:
        with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
            place = fresh(Path(folder) / "f")
            model = model_in(place, layers=LAYERS)
            with running(place, cpus=NODES[nodes]) as (s3, prefect, cluster):
                field = Field(folder=place, model=model, s3=s3, prefect=prefect, cluster=cluster)
                for workers in asked.workers:
                    field.workers = workers
                    name = f"{nodes}-nodes-{workers}-workers"
                    show(name, execute(field.command(name)), contents(place / "out" / name))
                if nodes == asked.nodes[-1]:
                    for number, attempt in enumerate(two_drivers(field)):
                        show(f"driver {number + 1} of 2", attempt, contents(place / "out" / "together"))
                found += leaks(place, texts)
    print(json.dumps({"distinct checkpoints": len(set(digests.values())), "places with the secret": found}))
    return 0 if clean and len(set(digests.values())) == 1 and not found else 1


if __name__ == "__main__":
    sys.exit(main())
