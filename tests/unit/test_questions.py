"""Files of questions: what is read, and that every mistake names its line."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lrpq.errors import CalibrationError, ModelError
from lrpq.evaluate.tasks import Continuation
from tasks import questions
from tasks.question_tokens import encode_question, encode_questions
from tasks.questions import Question, QuestionFile, read_questions

GOOD: dict[str, Any] = {"ctx": "The sky is ", "choices": ["blue", "square"], "label": 0}


def written(folder: Path, content: bytes) -> Path:
    path = folder / "questions.jsonl"
    path.write_bytes(content)
    return path


def changed(**changes: Any) -> bytes:
    """A good line, then one with these changes; None takes a key away."""
    bad = {key: value for key, value in (GOOD | changes).items() if value is not None}
    return f"{json.dumps(GOOD)}\n{json.dumps(bad)}\n".encode()


def test_questions_are_read_as_written(tmp_path: Path) -> None:
    second = {"id": 7, "ctx": "", "choices": ["Żółw", "b", "ab"], "label": 2}
    raw = b"\xef\xbb\xbf" + f"{json.dumps(GOOD)}\n\n{json.dumps(second, ensure_ascii=False)}".encode()
    path = written(tmp_path, raw)
    found = read_questions(path)
    assert found.questions == (
        Question(line=1, context="The sky is ", choices=("blue", "square"), label=0),
        Question(line=3, context="", choices=("Żółw", "b", "ab"), label=2),
    )
    assert (found.path, found.sha256) == (path, hashlib.sha256(raw).hexdigest())


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", ": holds no question; expected"),
        (b"\n \n", ": holds no question; expected"),
        (changed() + b"{'ctx'", ", line 3: not a JSON object"),
        (changed() + b"[1, 2]", ", line 3: not a JSON object"),
        (changed() + b'{"label": 0, "label": 1}', ", line 3: not a JSON object (a key occurs twice)"),
        (changed() + b'{"ctx": "\xff"}', ", line 3: not a JSON object"),
        (b"[" * 200_000, ", line 1: not a JSON object"),
        (changed(ctx=None), ", line 2: ctx is missing"),
        (changed(choices=None), ", line 2: choices is missing"),
        (changed(label=None), ", line 2: label is missing"),
        (changed(ctx=["a"]), ", line 2: ctx is a list, expected a text"),
        (changed(choices="ab"), ", line 2: choices is not a list of texts"),
        (changed(choices=["a", 1]), ", line 2: choices is not a list of texts"),
        (changed(choices=["a"]), ", line 2: 1 choices, expected at least 2"),
        (changed(choices=["a", ""]), ", line 2: choice 1 is empty"),
        (changed(label="0"), ", line 2: label is a text, expected"),
        (changed(label=True), ", line 2: label is true or false, expected"),
        (changed(label=0.0), ", line 2: label is a fraction, expected"),
        (changed(label=2), ", line 2: label 2 is out of range, expected 0 to 1"),
        (changed(label=-1), ", line 2: label -1 is out of range, expected 0 to 1"),
        (changed(ctx="\ud800"), ", line 2: holds half a surrogate pair"),
    ],
)
def test_a_mistake_is_one_line_that_names_its_place(tmp_path: Path, content: bytes, expected: str) -> None:
    path = written(tmp_path, content)
    with pytest.raises(CalibrationError) as caught:
        read_questions(path)
    message = str(caught.value)
    assert message.startswith(f"{path}{expected}")
    assert "\n" not in message


def test_files_that_are_none(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.jsonl", Path("/dev/zero")):
        with pytest.raises(CalibrationError, match="no such file; give a file of lines such as"):
            read_questions(path)


def test_size_is_bounded_while_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = json.dumps(GOOD).encode() + b"\n"
    monkeypatch.setattr(questions, "MAX_LINE_BYTES", len(line))
    assert len(read_questions(written(tmp_path, line * 3)).questions) == 3
    with pytest.raises(CalibrationError, match="line 2: longer than"):
        read_questions(written(tmp_path, line + b" " + line))
    monkeypatch.setattr(questions, "MAX_FILE_BYTES", 2 * len(line))
    with pytest.raises(CalibrationError, match="larger than"):
        read_questions(written(tmp_path, line * 3))


# --- tokens ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """Adds no BOS."""
    folder = tmp_path_factory.mktemp("tokenizers") / "plain"
    write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizers") / "bos"
    write_tokenizer(folder, bos=True)
    return AutoTokenizer.from_pretrained(folder)


def question(context: str, *choices: str) -> Question:
    return Question(line=4, context=context, choices=choices, label=0)


def ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False).input_ids)


@pytest.mark.parametrize("context", ["the function returns", "the function returns ", "the function returns \n "])
def test_spaces_at_the_contexts_end_belong_to_the_choices(plain: PreTrainedTokenizerBase, context: str) -> None:
    moved = context[len("the function returns") :]
    choices = ("the value", " the value", "an error")
    found = encode_question(question(context, *choices), plain, bos=None)
    start = ids(plain, "the function returns")
    for choice, continuation in zip(choices, found, strict=True):
        assert continuation.context == start
        assert continuation.tokens == ids(plain, context + choice)[len(start) :]
        text = "".join(plain.convert_ids_to_tokens(list(continuation.tokens)))
        assert text.replace("Ġ", " ").replace("Ċ", "\n") == moved + choice
    if context.endswith("s "):  # a word's token has its space: the same as if it had been the choice's
        spaced = encode_question(question("the function returns", " the value"), plain, bos=None)
        assert found[0] == spaced[0]
        assert found[0].tokens != ids(plain, "the value")


def test_tokens_that_join_over_the_border_are_cut_by_number(plain: PreTrainedTokenizerBase) -> None:
    """As in lm-evaluation-harness: tokens(context + choice) without the first len(tokens(context))."""
    (found,) = encode_question(question("functi", "on of the"), plain, bos=None)
    whole = ids(plain, "function of the")
    assert found.context == ids(plain, "functi")
    assert found.context != whole[: len(found.context)]  # the test means something
    assert found.tokens == whole[len(found.context) :] == ids(plain, " the")


def test_bos_is_where_the_tokenizer_puts_it_and_only_once(with_bos: PreTrainedTokenizerBase) -> None:
    (found,) = encode_question(question("a value", " is"), with_bos, bos=1)
    assert found == Continuation(context=(1, *ids(with_bos, "a value")), tokens=ids(with_bos, " is"))
    assert found.context == tuple(with_bos("a value").input_ids)
    assert encode_question(question("<s>a value", " is"), with_bos, bos=1) == [found]


@pytest.mark.parametrize("context", ["", " "])
def test_without_a_context_bos_is_the_context(plain: PreTrainedTokenizerBase, context: str) -> None:
    found = encode_question(question(context, "value", "return x"), plain, bos=None)
    assert [c.context for c in found] == [(1,), (1,)]
    assert [c.tokens for c in found] == [ids(plain, context + "value"), ids(plain, context + "return x")]


def encoded(asked: Question, tokenizer: PreTrainedTokenizerBase, *, vocab_size: int = 320, longest: int = 64) -> Any:
    file = QuestionFile(path=Path("q.jsonl"), sha256="", questions=(asked,))
    return encode_questions(file, tokenizer, vocab_size=vocab_size, longest=longest)


def test_what_the_model_cannot_read_is_refused_with_its_line(plain: PreTrainedTokenizerBase) -> None:
    joined = question("functio", "n", " x")  # tion is one token: nothing of it is the choice's
    with pytest.raises(CalibrationError, match=r"q.jsonl, line 4: choice 0 adds no token to its context"):
        encoded(joined, plain)
    asked = question("return x", " and", " or y")
    read = max(len(c.read) for c in encode_question(asked, plain, bos=None))
    assert encoded(asked, plain, longest=read) == [encode_question(asked, plain, bos=None)]
    with pytest.raises(CalibrationError, match=rf"line 4: choice 1 makes {read} tokens .* at most {read - 1}; shorten"):
        encoded(asked, plain, longest=read - 1)
    with pytest.raises(ModelError, match=r"line 4: the tokenizer gives token \d+, the model has 10"):
        encoded(asked, plain, vocab_size=10)


def test_no_context_and_no_token_to_stand_for_it(plain: PreTrainedTokenizerBase) -> None:
    class Without:
        bos_token_id = eos_token_id = None

    without: Any = Without()
    with pytest.raises(CalibrationError, match="line 9: ctx is empty and the tokenizer has no BOS and no EOS"):
        encode_question(question("", "a", "b"), without, bos=None, where="line 9")
