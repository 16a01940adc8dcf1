"""``lrpq evaluate --tasks`` on a tiny model and its rounded checkpoint, on the session's pool."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_case import start_pool, write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import flows.compress
from flows import cli
from lrpq.checkpoint.assemble import write_checkpoint
from lrpq.model.layers import Choice
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.streaming import BlockStream
from lrpq.quant.rtn import round_to_nearest
from tasks.calibration.pydoc import pydoc_documents
from tasks.cluster import Pool


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("evaluate-tasks") / "model", bos=True, dtype=torch.float32)


@pytest.fixture(scope="module")
def checkpoint(model: Path) -> Path:
    """Rounded to 2 bits."""
    source, output = ModelSource(model), model.parent / "checkpoint"
    stream, choice = BlockStream(source, dtype=torch.float32), Choice(bits=2, group_size=64)
    codes = {s.name: round_to_nearest(stream.weight(s), choice, name=s.name) for s in stream.specs}
    write_checkpoint(source, output, quantized=codes.get, choices=dict.fromkeys(codes, choice), manifest={})
    return output


WORDS = ("the", "of", "in", "is", "and", "to", "an")
"""Each one token behind a space, so that no choice is likelier for being shorter."""


@pytest.fixture(scope="module")
def questions() -> list[dict[str, Any]]:
    """Contexts of a text, three choices of two tokens; what is right is chosen without any sense."""
    words = "\n\n".join(pydoc_documents("evaluate")).split()[:4000]
    found = []
    for i in range(24):
        context = " ".join(words[150 * i : 150 * i + 3 + i])
        choices = [f"{WORDS[(i + k) % 7]} {WORDS[(i * i + 3 * k) % 7]}" for k in range(3)]
        found.append({"id": i, "ctx": f"{context} ", "choices": choices, "label": i % 3})
    return found


@pytest.fixture
def shared(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Commands run on the session's pool."""
    pool = start_pool(request)

    @contextmanager
    def open_shared(**_: object) -> Iterator[Pool]:
        yield pool

    monkeypatch.setattr(flows.compress, "open_pool", open_shared)
    monkeypatch.setenv("LRPQ_STORE", str(tmp_path / "store"))


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@torch.no_grad()
def plain_answers(folder: Path, questions: Sequence[dict[str, Any]], *, normalized: bool) -> list[int]:
    """The choices that a whole plain model takes."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers = []
    for question in questions:
        scores = []
        for choice in question["choices"]:
            start = len(tokenizer(question["ctx"].rstrip()).input_ids)
            ids = tokenizer(question["ctx"] + choice).input_ids
            logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            total = math.fsum(float(logits[k - 1, ids[k]]) for k in range(start, len(ids)))
            scores.append(total / len(choice) if normalized else total)
        answers.append(scores.index(max(scores)))
    return answers


def run(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    capfd.readouterr()
    code = cli.run(["evaluate", *map(str, arguments)])
    captured = capfd.readouterr()
    assert code == 0, captured.err
    return captured.out


@pytest.mark.usefixtures("shared")
def test_accuracies_are_those_of_plain_models(
    model: Path,
    checkpoint: Path,
    questions: list[dict[str, Any]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    first, second = write(tmp_path / "first.jsonl", questions[:15]), write(tmp_path / "second.jsonl", questions[15:])
    tasks = ("--tasks", first, "--tasks", second)
    document = json.loads(run(capfd, checkpoint, "--reference", model, *tasks, "--json"))
    assert "evaluation" not in document
    assert list(document["tasks"]) == ["first", "second"]
    differing = 0
    for name, asked in (("first", questions[:15]), ("second", questions[15:])):
        found = document["tasks"][name]
        assert (found["questions"], found["source"]) == (len(asked), str(tmp_path / f"{name}.jsonl"))
        assert found["chance"] == pytest.approx(1 / 3)
        for measure, normalized in (("acc", False), ("acc_norm", True)):
            answers = [plain_answers(folder, asked, normalized=normalized) for folder in (model, checkpoint)]
            right = [sum(a == q["label"] for a, q in zip(given, asked, strict=True)) / len(asked) for given in answers]
            of = found["measures"][measure]
            assert of["reference"]["mean"] == pytest.approx(right[0])
            assert of["checkpoint"]["mean"] == pytest.approx(right[1])
            assert of["difference"]["mean"] == pytest.approx(right[1] - right[0])
            alike = sum(a == b for a, b in zip(*answers, strict=True))
            assert of["agreement"] == pytest.approx(alike / len(asked))
            differing += len(asked) - alike
    assert differing  # the test means something


@pytest.mark.usefixtures("shared")
def test_labels_make_the_accuracy_and_text_is_measured_beside(
    model: Path,
    checkpoint: Path,
    questions: list[dict[str, Any]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The checkpoint's own answers as labels: it is always right, and the original as often as they agree."""
    answers = plain_answers(checkpoint, questions, normalized=False)
    own = [question | {"label": answer} for question, answer in zip(questions, answers, strict=True)]
    wrong = [question | {"label": (answer + 1) % 3} for question, answer in zip(questions, answers, strict=True)]
    tasks = ("--tasks", write(tmp_path / "own.jsonl", own), "--tasks", write(tmp_path / "wrong.jsonl", wrong))
    text = ("--evaluation", "pydoc:evaluate", "--evaluation-windows", "2", "--evaluation-length", "32")
    document = json.loads(run(capfd, checkpoint, "--reference", model, *tasks, *text, "--json"))
    acc = {name: task["measures"]["acc"] for name, task in document["tasks"].items()}
    assert (acc["own"]["checkpoint"]["mean"], acc["wrong"]["checkpoint"]["mean"]) == (1.0, 0.0)
    assert acc["own"]["reference"]["mean"] == acc["own"]["agreement"] == acc["wrong"]["agreement"] < 1
    assert acc["own"]["checkpoint"]["standard_error"] == 0.0
    assert document["evaluation"]["checkpoint"]["kl_nats"] > 0


@pytest.mark.usefixtures("shared")
def test_the_table(
    model: Path,
    checkpoint: Path,
    questions: list[dict[str, Any]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    path = write(tmp_path / "[a].jsonl", questions[:4])
    out = run(capfd, checkpoint, "--reference", model, "--tasks", path)
    assert "perplexity" not in out
    (row,) = (line for line in out.splitlines() if "[a]" in line)
    cells = [cell.strip() for cell in row.replace("┃", "│").split("│")]
    assert cells[1:5] == ["[a]", "4", "0.333", "acc"]
    assert all("+-" in cell for cell in cells[5:8])
    assert cells[8].endswith("%")
    assert "acc_norm" in out


# --- mistakes -------------------------------------------------------------------------------------

GOOD = '{"ctx": "a ", "choices": ["b", "c"], "label": 0}\n'


@pytest.fixture
def fails(model: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Any:
    """Runs with a file of this content; one line and exit code 2. No pool is opened."""

    def refused(**_: object) -> None:
        raise AssertionError("a mistake of the questions must show before workers start")

    monkeypatch.setattr(flows.compress, "open_pool", refused)
    monkeypatch.setenv("LRPQ_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def line(content: str | None, *more: str) -> str:
        path = tmp_path / "q.jsonl"
        if content is not None:
            path.write_text(content)
        capfd.readouterr()
        tasks = () if content is None else ("--tasks", str(path))
        assert cli.run(["evaluate", str(checkpoint), "--reference", str(model), *tasks, *more]) == 2
        captured = capfd.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1, captured.err
        assert captured.err.startswith("error: ")
        return str(captured.err)

    return line


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "q.jsonl: holds no question"),
        (GOOD + "{", "line 2: not a JSON object"),
        (GOOD + "[]", "line 2: not a JSON object"),
        (GOOD.replace('["b", "c"]', '["b"]'), "line 1: 1 choices, expected at least 2"),
        (GOOD.replace(" 0}", " 2}"), "line 1: label 2 is out of range, expected 0 to 1"),
        (GOOD.replace('"a "', '"functio"').replace('"b"', '"n"'), "line 1: choice 0 adds no token to its context"),
        (GOOD.replace('"a "', f'"{"v" * 600}"'), "line 1: choice 0 makes 601 tokens with its context, the model reads"),
    ],
)
def test_a_bad_file_is_one_line(fails: Any, content: str, expected: str) -> None:
    assert expected in fails(content)


def test_what_cannot_be_asked_is_one_line(fails: Any, tmp_path: Path) -> None:
    assert "nothing to measure on: give --evaluation SOURCE" in fails(None)
    assert "none.jsonl: no such file" in fails(None, "--tasks", "none.jsonl")
    assert "is given twice" in fails(GOOD, "--tasks", str(tmp_path / "q.jsonl"))
    assert "give --evaluation SOURCE too" in fails(GOOD, "--evaluation-length", "32")
    for bad in ("lm-eval:", "lm-eval::5", "lm-eval:arc_easy:", "lm-eval:arc_easy:0", "lm-eval:arc_easy:x"):
        assert "expected lm-eval:NAME or lm-eval:NAME:LIMIT" in fails(None, "--tasks", bad)


def test_a_missing_package_is_named(fails: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "lm_eval" else find(name, *more)
    )
    line = fails(GOOD, "--tasks", "lm-eval:arc_easy:10")
    assert "needs the package lm-eval" in line
    assert "pip install 'lrpq[tasks]'" in line


def test_files_of_one_name_go_by_their_paths(tmp_path: Path) -> None:
    from flows.task_accuracy import read_tasks

    paths = [tmp_path / "a" / "test.jsonl", tmp_path / "b" / "test.jsonl", tmp_path / "other.jsonl"]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_text(GOOD)
    assert list(read_tasks([str(path) for path in paths])) == [str(paths[0]), str(paths[1]), "other"]
