"""The questions that ``benchmarks.cloze`` makes of a text."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import cloze
from tasks.questions import read_questions

NOUNS = ("valley", "castle", "garden", "window", "bridge", "market", "forest", "Berlin", "London", "Madrid", "Vienna")
EIGHT = ("one", "two", "three", "four", "five", "six", "seven", "eight")
TEXT = "\n = Heading = \n" + "\n".join(
    f"The traveller who had come from far away in the {n} then saw another {noun} . And left ."
    for n, noun in enumerate(NOUNS)
)


def test_context_and_word_are_the_sentences_own() -> None:
    questions, available = cloze.build(TEXT, num_questions=100, seed=0)
    assert len(questions) == available == len(NOUNS)  # not the heading, not the short sentences
    for question, noun in zip(questions, NOUNS, strict=True):
        choices, label = question["choices"], question["label"]
        assert isinstance(choices, list)
        assert isinstance(label, int)
        assert choices[label] == noun
        assert str(question["ctx"]).endswith("then saw another ")
        assert len(set(choices)) == 4
        assert {cloze.alike(choice) for choice in choices} == {cloze.alike(noun)}
    assert len({question["label"] for question in questions}) > 1


def test_the_seed_decides() -> None:
    found = [cloze.build(TEXT, num_questions=4, seed=seed) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert len(found[0][0]) == 4


def test_sentences_without_a_word_or_with_unknown_ones_are_left_out() -> None:
    assert cloze.cut([*EIGHT, "with", "1984", "."]) is None
    assert cloze.cut([*EIGHT, "castles,", "with", "5", "."]) == (" ".join(EIGHT), "castles")
    assert cloze.sentences('The <unk> fell . It was " late " . \n = Title = \n') == [
        ["It", "was", '"', "late", '"', "."]
    ]


def test_what_it_writes_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, output = tmp_path / "text.txt", tmp_path / "cloze.jsonl"
    text.write_text(TEXT, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["cloze", str(text), "--output", str(output), "--questions", "5"])
    cloze.main()
    assert capsys.readouterr().out == f"5 questions of {len(NOUNS)} sentences that make one: {output}\n"
    found = read_questions(output).questions
    assert [len(question.choices) for question in found] == [4] * 5
    assert json.loads(output.read_text().splitlines()[0])["id"] == 0
    text.write_text("Too short .")
    with pytest.raises(SystemExit, match="2"):
        cloze.main()
    assert "no sentence makes a question" in capsys.readouterr().err
