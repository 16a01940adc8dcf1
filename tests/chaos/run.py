"""``python -m tests.chaos.run``: the kill matrix, as a table and as JSON."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from .field import model_in
from .kills import LAYERS, STAGES, Field, Kind, Row, fresh, kill, undisturbed
from .leaks import leaks
from .services import running

COLUMNS = ("kind", "stage", "moment", "completed", "redone", "bound", "identical", "seconds")


def planned(kinds: list[Kind], stages: list[str], repeats: int) -> list[tuple[Kind, str, int]]:
    """Kind, stage and seed of every row; the spill disk matters in the profile only, once small and once tiny."""
    rows = [(kind, stage, seed) for seed in range(repeats) for kind in kinds for stage in stages]
    rows = [row for row in rows if row[0] is not Kind.DISK]
    if Kind.DISK in kinds and "profile" in stages:
        rows += [(Kind.DISK, "profile", 0), (Kind.DISK, "profile", 1)]
    return rows


def line(row: Row) -> str:
    """One line of the table."""
    values = {**asdict(row), "seconds": f"{row.seconds:.0f}", "identical": "yes" if row.identical else "NO"}
    return "| " + " | ".join(str(values[name]) for name in COLUMNS) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="*", default=[kind.name for kind in Kind], choices=[k.name for k in Kind])
    parser.add_argument("--stages", nargs="*", default=list(STAGES), choices=STAGES)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="added to the seed of every row")
    parser.add_argument("--output", type=Path, help="where the rows go as JSON")
    asked = parser.parse_args()
    if asked.output is not None:
        asked.output.parent.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        place = fresh(Path(folder) / "f")
        model = model_in(place, layers=LAYERS)
        with running(place, cpus=[1, 1]) as (s3, prefect, cluster):
            field = Field(folder=place, model=model, s3=s3, prefect=prefect, cluster=cluster)
            first = undisturbed(field)
            texts = [first.out, first.err]
            print(f"undisturbed: {first.seconds:.0f} s; units {field.units}", flush=True)
            print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS), flush=True)
            for kind, stage, seed in planned([Kind[k] for k in asked.kinds], asked.stages, asked.repeats):
                row = kill(field, kind, stage, seed=seed + asked.seed, said=texts)
                rows.append(row)
                said = f" {row.exit_codes} {row.message}" if row.message else ""
                print(line(row) + said + ("" if row.passed else " NOT PASSED"), flush=True)
                if asked.output is not None:
                    asked.output.write_text(json.dumps([{**asdict(r), "passed": r.passed} for r in rows], indent=1))
            found = leaks(place, texts)
    print(f"places with the store's secret: {found}")
    failed = [row for row in rows if not row.passed]
    print(f"{len(rows)} kills, {len(failed)} not survived as promised")
    return 1 if failed or found else 0


if __name__ == "__main__":
    sys.exit(main())
