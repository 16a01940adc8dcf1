"""``lrpq compare`` from the command line, on a tiny model: every method runs, rows are kept, terms are held."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from pipeline_case import write_model
from tiny_models import write_tiny, write_tokenizer

from flows.cli import run
from flows.comparison import summary
from flows.comparison_table import comparison_table
from flows.pareto import is_on_front
from lrpq.compare.methods import METHODS, Axis, methods_named
from lrpq.compare.recipes import CONTROL, DEFAULT, TUNINGS
from lrpq.errors import ConfigError

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("compare") / "llama", hidden=64, ffn=256, tied=True)


def command(model: Path, output: Path, *more: str) -> list[str]:
    text = ["--calibration", "pydoc:calibrate", "--calibration-windows", "4", "--length", "32"]
    measured = ["--evaluation-windows", "3", "--evaluation-length", "32", "--device", "cpu"]
    return ["compare", str(model), *text, *measured, "--group-size", "32", "--output", str(output), *more]


def document(output: Path) -> dict[str, Any]:
    return dict(json.loads((output / "compare.json").read_text()))


@pytest.fixture(scope="module")
def everything(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All methods at one budget, scales of one kind."""
    output = tmp_path_factory.mktemp("compared") / "all"
    assert run(command(model, output, "--methods", "*", "--budgets", "3.5", "--scales", "bfloat16")) == 0
    return output


def test_every_method_has_a_row_within_its_budget(everything: Path) -> None:
    found = document(everything)
    assert sorted(row["method"] for row in found["rows"]) == sorted(METHODS)
    assert len(METHODS) >= 25
    for row in found["rows"]:
        assert row["all_in_bits"] <= 3.5
        assert row["kl_nats"] > 0
        assert len(row["kl_windows"]) == 3
        assert row["peak_bytes"] > 0
    by_method = {row["method"]: row for row in found["rows"]}
    assert by_method["lrpq"]["kl_nats"] < by_method["control"]["kl_nats"] < by_method["nearest"]["kl_nats"]
    assert by_method["without:allocation"]["all_in_bits"] == 3.5
    assert by_method["transform:hadamard"]["checkpoint_bytes"] > by_method["lrpq"]["checkpoint_bytes"]  # untied head
    for name, method in METHODS.items():  # a method that changes nothing would be its parent
        parent = CONTROL if method.axis is Axis.ADDED else DEFAULT
        if method.recipe != parent and method.axis not in (Axis.ALLOCATION, Axis.TUNING):
            known = "control" if parent is CONTROL else "lrpq"
            assert by_method[name]["kl_windows"] != by_method[known]["kl_windows"], name
    # four windows may not be enough for an epoch of tuning to be better than none; of all of them one is
    assert any(by_method[f"tuned:{name}"]["kl_windows"] != by_method["lrpq"]["kl_windows"] for name in TUNINGS)
    assert by_method["lrpq+swaps"]["counts"]["swaps_tried"] > 0
    assert by_method["allocation:coopq"]["counts"]["blocks_demoted"] == 1  # of two, at 2 and 4 bits
    assert "modules_changed" in by_method["allocation:re-estimated"]["counts"]
    allocations = {tuple(r["kl_windows"]) for r in found["rows"] if METHODS[r["method"]].axis is Axis.ALLOCATION}
    assert len(allocations) >= 6


def test_table_and_pareto_are_those_of_the_rows(everything: Path) -> None:
    found = document(everything)
    assert (everything / "pareto.png").read_bytes().startswith(PNG)
    rows = list(csv.DictReader((everything / "pareto.csv").read_text().splitlines()))
    assert [row["method"] for row in rows] == [row["method"] for row in found["table"]]
    best = min(found["table"], key=lambda row: (row["kl_nats"], row["all_in_bits"]))
    assert next(row for row in rows if row["method"] == best["method"])["on_front"] == "True"
    ours = next(row for row in found["table"] if row["method"] == "lrpq")
    assert (ours["against_lrpq"], ours["against_lrpq_error"]) == (0.0, 0.0)


def test_rows_are_kept_and_only_missing_ones_are_measured(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command(model, tmp_path, "--methods", "lrpq,control", "--budgets", "3.5")) == 0
    first = document(tmp_path)["rows"]
    capsys.readouterr()
    assert run(command(model, tmp_path, "--methods", "lrpq,control", "--budgets", "3.5,4.5", "--json")) == 0
    again = document(tmp_path)["rows"]
    assert again[:2] == first  # seconds and all: not measured again
    original = document(tmp_path)["original"]
    assert original["kl_nats"] == 0
    assert [(row["method"], row["budget_bits"]) for row in again[2:]] == [("lrpq", 4.5), ("control", 4.5)]
    assert json.loads(capsys.readouterr().out)["rows"] == again
    assert run(command(model, tmp_path, "--methods", "control", "--budgets", "3.5", "--bits", "2,3,4")) == 2
    assert "other settings" in capsys.readouterr().err
    assert document(tmp_path)["rows"] == again
    assert run(command(model, tmp_path, "--methods", "lrpq", "--budgets", "3.5")) == 0  # nothing is missing
    assert (document(tmp_path)["rows"], document(tmp_path)["original"]) == (again, original)


def test_rows_of_another_text_are_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    measured = ("--evaluation", f"text:{text}", "--methods", "control", "--budgets", "3.5")
    assert run(command(model, tmp_path / "out", *measured)) == 0
    text.write_text("Colourless green ideas sleep furiously, and so do we. " * 60)
    assert run(command(model, tmp_path / "out", *measured)) == 2
    assert "other texts" in capsys.readouterr().err


def test_a_methods_row_does_not_depend_on_the_others(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    """In bfloat16, where another attention kernel moves every number."""
    model = write_tiny(tmp_path_factory.mktemp("bf16") / "qwen3", "qwen3-bf16-sharded")
    write_tokenizer(model)
    assert run(command(model, tmp_path / "a", "--methods", "lrpq", "--budgets", "3.5")) == 0
    assert run(command(model, tmp_path / "b", "--methods", "weights:attention,lrpq", "--budgets", "3.5")) == 0
    alone, beside = document(tmp_path / "a")["rows"][0], document(tmp_path / "b")["rows"][1]
    assert (alone["method"], alone["kl_windows"]) == (beside["method"], beside["kl_windows"])


def test_one_seed_one_result(model: Path, everything: Path, tmp_path: Path) -> None:
    asked = ("--methods", "lrpq", "--budgets", "3.5", "--scales", "bfloat16", "--seeds", "0,1")
    assert run(command(model, tmp_path, *asked)) == 0
    rows = document(tmp_path)["rows"]
    same = next(row for row in document(everything)["rows"] if row["method"] == "lrpq")
    assert rows[0]["kl_windows"] == same["kl_windows"]
    assert rows[1]["kl_windows"] != same["kl_windows"]
    (table,) = document(tmp_path)["table"]
    assert table["seeds"] == 2


def test_list_names_every_method_with_its_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compare", "--list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [item["method"] for item in found] == list(METHODS)
    assert all(item["source"] for item in found)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--methods", "alocation:lim"], "method 'alocation:lim': not known"),
        (["--budgets", "three"], "--budgets 'three': expected numbers"),
        (["--budgets", "17"], "17"),
        (["--group-size", "48"], "48 is not one of"),
        (["--evaluation", "text:https://user:secret@host/x"], "holds a secret"),
    ],
)
def test_bad_requests_are_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    assert run(command(model, tmp_path / "x", *more)) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("error: ")
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--methods", "tuned:scales", "--held-out-windows", "0"], "method tuned:scales: tuning is chosen on held-out"),
        (["--methods", "lrpq+swaps", "--held-out-windows", "0"], "method lrpq+swaps: swaps are accepted on held-out"),
        (["--methods", "allocation:lim", "--budgets", "3.5", "--bits", "3,4"], "method allocation:lim: a ranking"),
        (["--methods", "allocation:coopq", "--bits", "3,4"], "method allocation:coopq: blocks are demoted by two bits"),
    ],
)
def test_what_cannot_be_done_is_said_before_the_work(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    assert run(command(model, tmp_path, *more)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "compare.json").exists()


def test_an_output_that_is_a_file(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert run(command(model, tmp_path / "file", "--methods", "control")) == 2
    assert "cannot be made" in capsys.readouterr().err


def test_damaged_rows_are_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command(model, tmp_path, "--methods", "control", "--budgets", "3.5")) == 0
    whole = document(tmp_path)
    row = whole["rows"][0]
    for damaged in ({"method": "control"}, {**row, "kl_windows": 3}, {**row, "counts": {"swaps_tried": "3"}}, 5):
        (tmp_path / "compare.json").write_text(json.dumps({**whole, "rows": [damaged]}))
        assert run(command(model, tmp_path, "--methods", "control", "--budgets", "3.5")) == 2
        assert "rows are damaged" in capsys.readouterr().err


def test_a_damaged_document_is_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "compare.json").write_text("{")
    assert run(command(model, tmp_path, "--methods", "control", "--budgets", "3.5")) == 2
    assert "is not a comparison" in capsys.readouterr().err


def test_names_and_wildcards() -> None:
    assert list(methods_named(["weights:*"])) == [name for name in METHODS if name.startswith("weights:")]
    with pytest.raises(ConfigError, match="--list"):
        methods_named(["nothing:*"])


def test_summary_pairs_windows() -> None:
    common = {"seed": 0, "budget_bits": 3.0, "all_in_bits": 3.0, "perplexity": 9.0, "predicted_nats": 0.1}
    common |= {"seconds": 1.0, "peak_bytes": 1, "checkpoint_bytes": 1, "counts": {"tried": 3, "accepted": 0}}
    rows = [
        {**common, "method": "lrpq", "kl_windows": [0.1, 0.3]},
        {**common, "method": "control", "kl_windows": [0.2, 0.4]},
    ]
    ours, control = summary(rows)
    assert control["kl_nats"] == pytest.approx(0.3)
    assert control["against_lrpq"] == pytest.approx(0.1)
    assert control["against_lrpq_error"] == pytest.approx(0.0)
    # seeds are scored on the same windows: their values are not independent
    again = [{**row, "seed": 1} for row in rows]
    assert summary(rows + again)[0]["kl_standard_error"] == pytest.approx(ours["kl_standard_error"])
    assert summary(rows + again)[0]["counts"] == {"tried": 6, "accepted": 0}
    assert comparison_table(summary(rows)).caption == (
        "lrpq at 3: tried 3, accepted 0\ncontrol at 3: tried 3, accepted 0"
    )
    assert is_on_front(ours, [ours, control])
    assert not is_on_front(control, [ours, control])
