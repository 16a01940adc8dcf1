"""The benchmark of forecasts measures what it says: candidates and refined codes of one plan, on two texts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from conftest import write_llama

from benchmarks.forecast import divergence, shares, summary
from lrpq.allocate.forecast import REFINED
from lrpq.compare import allocation
from lrpq.compare.codes import stitched
from lrpq.compare.recipes import DEFAULT, STITCHED
from lrpq.compare.terms import Terms
from lrpq.compare.workbench import Workbench
from lrpq.importance.registry import MEASURES
from lrpq.model.source import open_source


def test_both_kinds_of_codes_are_measured_on_both_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = torch.randint(0, 128, (14, 32), generator=torch.Generator().manual_seed(0))
    terms = Terms(bits=(2, 3, 4), group_sizes=(32,), dtype=torch.float32, shards=2, micro_batch=4, seed=5)
    bench = Workbench(open_source(write_llama(tmp_path / "m")), tokens[:8], terms)
    held_out, text = tokens[8:10], tokens[10:]
    left = shares(bench, held_out, text, [3.5])
    (line,) = capsys.readouterr().out.splitlines()
    numbers = [float(number) for number in re.findall(r"(?:candidates|refined) ([\d.]+)", line)]
    gathered = bench.gather(
        {"lrpq": MEASURES["lrpq"]},
        weightings=("blend",),
        candidates_by="blend",
        keep_candidates=True,
        with_outputs=True,
    )
    plan = allocation.by_costs(gathered.costs["lrpq"], budget_bits=3.5)
    codes = [stitched(gathered.candidates, plan), bench.codes(plan.choices, DEFAULT, gathered)]
    wanted = [divergence(bench, windows, of) for windows in (held_out, text) for of in codes]
    assert numbers == pytest.approx(wanted, abs=6e-6)
    assert len(set(numbers)) == 4
    assert left == pytest.approx([wanted[3] / wanted[2]])
    forecast = re.findall(r"forecast ([\d.]+) \(measured is ([\d.]+) times it\)", line)
    assert [float(number) for number in forecast[0]] == pytest.approx(
        [REFINED * wanted[2], wanted[3] / wanted[2] / REFINED], abs=6e-3
    )
    assert summary([0.5, 0.72]) == f"left: 0.600 in the geometric mean, 0.500 to 0.720; compress takes {REFINED:g}"
    again = bench.codes(plan.choices, STITCHED, gathered)
    assert divergence(bench, text, again) == pytest.approx(wanted[2], rel=1e-5)
