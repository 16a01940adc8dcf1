"""``benchmarks.correlation`` on a tiny model, where Ray, Prefect and typer cannot be imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pipeline_case import write_model

from benchmarks.correlation import BITS, CEILING, DIRECTIONAL, PREDICTIONS, ranks, spearman
from tasks.calibration.pydoc import pydoc_documents

RUN = """
import runpy, sys
for name in ("ray", "prefect", "typer", "boto3", "highspy"):
    sys.modules[name] = None
sys.argv[0] = "correlation"
runpy.run_module("benchmarks.correlation", run_name="__main__")
"""


def test_it_prints_and_writes_the_table(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", layers=3, hidden=64, ffn=128)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(pydoc_documents("calibrate"))[:40_000])
    arguments = [str(model), "--calibration", str(text), "--windows", "4", "--length", "32", "--probe", "2"]
    command = [sys.executable, "-c", RUN, *arguments, "--json", str(tmp_path / "found.json")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["modules"] == 3 * 7
    values = {(row["bits"], row["measure"]): row["spearman"] for row in found["rows"]}
    assert set(values) == {(bits, name) for bits in BITS for name in (CEILING, DIRECTIONAL, *PREDICTIONS)}
    for bits in BITS:
        ceiling = values[bits, CEILING]
        assert 0.5 < ceiling <= 1.0
        assert min(values[bits, "lrpq"], values[bits, DIRECTIONAL]) > 0.5  # one that says nothing would be about zero
        for row in found["rows"]:
            if row["bits"] == bits:
                assert row["below_ceiling"] == pytest.approx(ceiling - row["spearman"])
    lines = [line for line in ended.stdout.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in lines[:2]] == ["| measure", f"| {CEILING}"]
    assert len(lines) == 2 + 1 + len(PREDICTIONS)


def test_spearman_is_the_correlation_of_ranks() -> None:
    assert ranks([3.0, 1.0, 2.0, 2.0]).tolist() == [4.0, 1.0, 2.5, 2.5]
    assert spearman([1.0, 2.0, 3.0], [10.0, 20.0, 1e9]) == pytest.approx(1.0)
    assert spearman([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1.0)
    assert spearman([1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 4.0, 3.0]) == pytest.approx(0.6)  # 1 - 6 * 4 / (4 * 15)
    assert spearman([1.0, 1.0], [1.0, 2.0]) != spearman([1.0, 1.0], [1.0, 2.0])  # not a number
