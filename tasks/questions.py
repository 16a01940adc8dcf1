"""Multiple-choice questions of a local file, one JSON object a line.

``{"ctx": TEXT, "choices": [TEXT, ...], "label": POSITION}``; further keys, such as ``id``, are ignored. A choice is
appended to the context as it is, so where a word begins, the context ends with a space or the choice begins with one.
The former counts as in lm-evaluation-harness: ``acc_norm`` divides by the choice's characters without that space.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lrpq.errors import CalibrationError
from tasks.store.documents import JSON, parse_object

MAX_LINE_BYTES = 1 << 20
MAX_FILE_BYTES = 64 << 20
"""HellaSwag's 10,042 questions are a sixth of it. All questions are in memory, and their tokens."""
FORM = '{"ctx": TEXT, "choices": [TEXT, TEXT, ...], "label": POSITION}'
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question."""

    line: int
    """Where it stands in its file, from 1."""
    context: str
    """May be empty."""
    choices: tuple[str, ...]
    """At least two, none empty."""
    label: int
    """Position of the right choice, from 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionFile:
    """All questions of a file; at least one."""

    path: Path
    sha256: str
    """Of the file's bytes."""
    questions: tuple[Question, ...]


def read_questions(path: Path) -> QuestionFile:
    """Read a file line by line.

    Raises:
        CalibrationError: no such file, too large, empty, or a line that is no question; the line is named.
    """
    if not path.is_file():
        raise CalibrationError(f"{path}: no such file; give a file of lines such as {FORM}, or lm-eval:NAME")
    questions: list[Question] = []
    digest, size, line = hashlib.sha256(), 0, 0
    try:
        with path.open("rb") as file:
            while raw := file.readline(MAX_LINE_BYTES + 1):
                line += 1
                size += len(raw)
                if len(raw) > MAX_LINE_BYTES:
                    raise CalibrationError(f"{path}, line {line}: longer than {MAX_LINE_BYTES} bytes; {_expected()}")
                if size > MAX_FILE_BYTES:
                    raise CalibrationError(f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB; give fewer questions")
                digest.update(raw)
                text = raw.removeprefix(BYTE_ORDER_MARK) if line == 1 else raw
                if text.strip():
                    questions.append(_question(text, path=path, line=line))
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    if not questions:
        raise CalibrationError(f"{path}: holds no question; {_expected()}")
    return QuestionFile(path=path, sha256=digest.hexdigest(), questions=tuple(questions))


def _expected() -> str:
    return f"expected {FORM} a line"


def _question(raw: bytes, *, path: Path, line: int) -> Question:
    where = f"{path}, line {line}"
    try:
        values = parse_object(raw)
    except ValueError as error:
        raise CalibrationError(f"{where}: not a JSON object ({error}); {_expected()}") from None
    context, choices, label = (_value(values, key, where=where) for key in ("ctx", "choices", "label"))
    if not isinstance(context, str):
        raise CalibrationError(f"{where}: ctx is {_kind(context)}, expected a text; {_expected()}")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise CalibrationError(f"{where}: choices is not a list of texts; {_expected()}")
    if len(choices) < 2:
        raise CalibrationError(f"{where}: {len(choices)} choices, expected at least 2; add the wrong answers")
    if not all(choices):
        raise CalibrationError(f"{where}: choice {choices.index('')} is empty; leave it out or write its text")
    if not isinstance(label, int) or isinstance(label, bool):
        raise CalibrationError(f"{where}: label is {_kind(label)}, expected the right choice's position from 0")
    if not 0 <= label < len(choices):
        raise CalibrationError(
            f"{where}: label {label} is out of range, expected 0 to {len(choices) - 1}: the right choice's position"
        )
    try:
        "".join((context, *choices)).encode()
    except UnicodeEncodeError:
        raise CalibrationError(f"{where}: holds half a surrogate pair, which is no text; write the character") from None
    return Question(line=line, context=context, choices=tuple(choices), label=label)


def _value(values: Mapping[str, JSON], key: str, *, where: str) -> JSON:
    if key not in values:
        raise CalibrationError(f"{where}: {key} is missing; {_expected()}")
    return values[key]


def _kind(value: object) -> str:
    names = {
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a fraction",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), "null")
