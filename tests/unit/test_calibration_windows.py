"""Windows: placement, BOS, chat packing, token columns, and the text that two sets of windows share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lrpq.errors import CalibrationError, ConfigError
from tasks.calibration import (
    Windows,
    load,
    load_windows,
    overlap_warning,
    parse_source,
    share_source,
    tokenize_windows,
)
from tasks.calibration.overlap import SHARED_NGRAMS
from tasks.calibration.pydoc import pydoc_documents
from tasks.calibration.windows import POOL

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TEXT = "\n\n".join(pydoc_documents("evaluate"))[:30_000]


def make_tokenizer(*, adds_bos: bool, template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level BPE with merges, so that where a text is cut before tokenising shows."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "bos"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return make_tokenizer(adds_bos=request.param)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "t.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


def windows_of(tokens: list[list[int]], **fields: Any) -> Windows:
    defaults = {
        "source": "t",
        "documents_digest": "d",
        "num_documents": 1,
        "stream_tokens": 0,
        "asked_windows": 1,
    }
    return Windows(tokens=torch.tensor(tokens), exhausted=True, **{**defaults, **fields})


def the_rulers_windows(tok: PreTrainedTokenizerFast, text: str, asked: int, length: int) -> list[list[int]]:
    """The windows of the independent measurement, step by step: the stated rule, not our code."""
    ids = tok(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
    bos = tok.bos_token_id if tok("a").input_ids[:1] == [tok.bos_token_id] else None
    n = min(asked, len(ids) // length)
    stride = (len(ids) // length) // n
    cut = [ids[i * stride * length : (i * stride + 1) * length] for i in range(n)]
    return [(w if bos is None else torch.cat([torch.tensor([bos]), w[:-1]])).tolist() for w in cut]


# ---- placement -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "length"), [(1, 7), (5, 64), (13, 100), (10_000, 300)])
def test_spread_windows_are_the_rulers(
    tokenizer: PreTrainedTokenizerFast,
    text_file: Path,
    asked: int,
    length: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(load, "PIECE_CHARS", 100)  # spread windows take the text whole all the same
    source = parse_source(f"text:{text_file}")
    got = load_windows(source, tokenizer, num_windows=asked, length=length, seed=0, placement="spread")
    assert got.tokens.dtype == torch.int64
    assert got.tokens.tolist() == the_rulers_windows(tokenizer, TEXT, asked, length)
    assert got.exhausted
    assert got.missing_windows == asked - got.num_windows


@settings(max_examples=40, deadline=None)
@given(num_windows=st.integers(1, 12), length=st.integers(2, 90), seed=st.integers(0, 2**32 - 1))
def test_random_windows_are_runs_of_the_text_that_do_not_overlap(num_windows: int, length: int, seed: int) -> None:
    # every token of this stream is its own position, so a window says where it was cut
    class Positions:
        bos_token_id = None

        def __call__(self, text: str, **_options: object) -> Any:
            return type("Encoding", (), {"input_ids": list(range(len(text)))})

    text = "x" * 400
    ask = {"num_windows": num_windows, "length": length, "seed": seed}
    got = tokenize_windows(Positions(), [text], **ask)
    rows = got.tokens.numpy()
    assert rows.shape == (min(num_windows, 400 // length), length)
    assert (np.diff(rows, axis=1) == 1).all()
    starts = np.sort(rows[:, 0])
    assert (np.diff(starts) >= length).all()
    assert starts[0] >= 0
    assert starts[-1] + length <= 400
    again = tokenize_windows(Positions(), [text], **ask)
    assert again.digest == got.digest


def test_random_windows_follow_the_seed(tokenizer: PreTrainedTokenizerFast) -> None:
    draws = [
        tokenize_windows(tokenizer, [TEXT], num_windows=4, length=64, seed=seed, placement="random")
        for seed in range(3)
    ]
    assert len({draw.digest for draw in draws}) == 3
    assert len({draw.documents_digest for draw in draws}) == 1


def test_reading_ends_with_the_pool() -> None:
    plain = make_tokenizer(adds_bos=False)
    read = []

    def endless() -> Any:
        while True:
            read.append(1)
            yield "if x: return y\n" * 10

    per_document = len(plain("if x: return y\n" * 10).input_ids)
    for placement, factor in (("random", POOL), ("first", 1)):
        read.clear()
        got = tokenize_windows(plain, endless(), num_windows=6, length=50, seed=0, placement=placement)
        assert len(read) == -(-6 * 50 * factor // per_document)
        assert got.num_documents == len(read)
        assert got.stream_tokens == len(read) * per_document
        assert not got.exhausted
        assert got.missing_windows == 0


def test_bos_replaces_the_last_token_of_a_window() -> None:
    ask: dict[str, Any] = {"num_windows": 3, "length": 40, "seed": 0, "placement": "first"}
    plain = tokenize_windows(make_tokenizer(adds_bos=False), [TEXT], **ask).tokens
    with_bos = tokenize_windows(make_tokenizer(adds_bos=True), [TEXT], **ask).tokens
    assert (with_bos[:, 0] == 0).all()
    assert torch.equal(with_bos[:, 1:], plain[:, :-1])


# ---- what cannot be used -------------------------------------------------------------------------


def test_too_short_a_text_is_refused_with_both_counts(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    ids = tokenizer("def f(): return 1", add_special_tokens=False).input_ids
    file.write_text("def f(): return 1")
    source = parse_source(str(file))
    load_windows(source, tokenizer, num_windows=1, length=len(ids), seed=0)
    with pytest.raises(CalibrationError) as caught:
        load_windows(source, tokenizer, num_windows=1, length=len(ids) + 1, seed=0)
    assert f"text:{file}: {len(ids)} tokens found, {len(ids) + 1} needed" in str(caught.value)
    assert "\n" not in str(caught.value)
    file.write_text("")
    with pytest.raises(CalibrationError, match=r"short.txt: the text is empty, 8 tokens needed"):
        load_windows(source, tokenizer, num_windows=1, length=8, seed=0)


@pytest.mark.parametrize("change", [{"num_windows": 0}, {"length": 1}, {"placement": "middle"}])
def test_impossible_requests_are_refused(tokenizer: PreTrainedTokenizerFast, change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        tokenize_windows(tokenizer, [TEXT], **{"num_windows": 1, "length": 8, "seed": 0, **change})


# ---- chat ----------------------------------------------------------------------------------------

CHATS = [
    [
        {"role": "user", "content": f"question {i} " * (1 + i % 5)},
        {"role": "assistant", "content": f"answer {i}"},
    ]
    for i in range(60)
]


@pytest.mark.parametrize("placement", ["first", "random", "spread"])
def test_chat_windows_begin_with_a_conversation(tokenizer: PreTrainedTokenizerFast, placement: Any) -> None:
    rendered = [
        tokenizer(tokenizer.apply_chat_template(chat, tokenize=False), add_special_tokens=False).input_ids
        for chat in CHATS
    ]
    bos = [0] if tokenizer("a").input_ids[0] == 0 else []
    expected, current = [], list[int]()
    for ids in rendered:
        current = [*(current or bos), *ids]
        if len(current) >= 60:
            expected.append(current[:60])
            current = []
    got = tokenize_windows(tokenizer, CHATS, num_windows=4, length=60, seed=1, placement=placement)
    rows = got.tokens.tolist()
    assert len(expected) > 8
    if placement == "random":
        assert all(row in expected for row in rows)
        assert len({tuple(row) for row in rows}) == 4
        assert rows != expected[:4]
    else:
        stride = len(expected) // 4 if placement == "spread" else 1
        assert rows == expected[: 4 * stride : stride]
    assert all(row[len(bos)] == tokenizer.convert_tokens_to_ids("<|im_start|>") for row in rows)


def test_a_template_that_writes_bos_gets_no_second_one() -> None:
    twice = make_tokenizer(adds_bos=True, template="<s>" + TEMPLATE)
    rows = tokenize_windows(twice, CHATS, num_windows=4, length=60, seed=1).tokens.tolist()
    assert all(row[0] == 0 and row[1] != 0 for row in rows)


def test_chat_that_cannot_be_rendered_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    ask: dict[str, Any] = {"num_windows": 1, "length": 8, "seed": 0, "source": "hub:x"}
    with pytest.raises(CalibrationError, match=r"hub:x: conversation 1: .*tokenizer has no chat template"):
        tokenize_windows(make_tokenizer(adds_bos=False, template=None), CHATS, **ask)
    strict = make_tokenizer(adds_bos=False, template="{{ raise_exception('no system role') }}")
    with pytest.raises(CalibrationError, match=r"roles \['user', 'assistant'\] \(no system role\)"):
        tokenize_windows(strict, CHATS, **ask)
    with pytest.raises(CalibrationError, match="hub:x: document 2 mixes"):
        tokenize_windows(tokenizer, [CHATS[0], "text"], **{**ask, "length": 500})
    with pytest.raises(CalibrationError, match="hub:x: document 2 mixes"):
        tokenize_windows(tokenizer, ["text", CHATS[0]], **{**ask, "length": 500})


# ---- token columns -------------------------------------------------------------------------------


def write_tokens(folder: Path, rows: list[list[int] | None], column: str = "input_ids") -> Any:
    pq.write_table(pa.table({column: pa.array(rows, pa.list_(pa.int32()))}), folder / "t.parquet")
    return parse_source(f"parquet:{folder}/t.parquet")


@pytest.mark.parametrize("column", ["tokens", "input_ids"])
def test_token_rows_are_used_as_they_are(tmp_path: Path, column: str) -> None:
    rows = [[i, i + 1, i + 2, 0, 0] for i in range(40)]
    source = write_tokens(tmp_path, rows, column)
    with_bos = make_tokenizer(adds_bos=True)
    ask: dict[str, Any] = {"num_windows": 5, "length": 4, "seed": 3}
    assert load_windows(source, with_bos, **ask, placement="first").tokens.tolist() == [r[:4] for r in rows[:5]]
    spread = load_windows(source, with_bos, **ask, placement="spread")
    assert spread.tokens.tolist() == [row[:4] for row in rows[::8]]
    drawn = load_windows(source, with_bos, **ask, placement="random").tokens.tolist()
    assert all([*row, 0] in rows for row in drawn)
    assert len({tuple(row) for row in drawn}) == 5


def test_token_rows_are_checked(tmp_path: Path) -> None:
    plain = make_tokenizer(adds_bos=False)
    ask: dict[str, Any] = {"num_windows": 2, "length": 3, "seed": 0}
    size = len(plain)
    good = write_tokens(tmp_path, [[0, 1, size - 1]])
    assert load_windows(good, plain, **ask).missing_windows == 1
    with pytest.raises(CalibrationError, match="row 1 holds the token id 5, outside the vocabulary of 5"):
        load_windows(write_tokens(tmp_path, [[0, 1, 5]]), plain, vocab_size=5, **ask)
    with pytest.raises(CalibrationError, match=f"row 2 holds the token id {size}, outside"):
        load_windows(write_tokens(tmp_path, [[0, 1, 2], [0, 1, size]]), plain, **ask)
    with pytest.raises(CalibrationError, match="row 1 holds the token id -1, outside"):
        load_windows(write_tokens(tmp_path, [[0, -1, 2]]), plain, **ask)
    with pytest.raises(CalibrationError, match="row 2 holds 2 tokens, 3 needed"):
        load_windows(write_tokens(tmp_path, [[0, 1, 2], [0, 1]]), plain, **ask)
    with pytest.raises(CalibrationError, match="row 1 holds 0 tokens, 3 needed"):
        load_windows(write_tokens(tmp_path, [None]), plain, **ask)
    with pytest.raises(CalibrationError, match="the text is empty"):
        load_windows(write_tokens(tmp_path, []), plain, **ask)


# ---- naming and overlap --------------------------------------------------------------------------


def test_the_digest_is_of_ids_and_shape() -> None:
    one = windows_of([[1, 2, 3, 4]])
    assert one.digest == windows_of([[1, 2, 3, 4]], source="other").digest
    assert one.digest != windows_of([[1, 2], [3, 4]]).digest
    assert one.digest != windows_of([[1, 2, 3, 5]]).digest


def seen_by_brute_force(calibration: list[list[int]], evaluation: list[list[int]], ngram: int) -> float:
    runs = [tuple(row[i : i + ngram]) for row in calibration for i in range(1, len(row) - ngram + 1)]
    seen = 0
    for row in evaluation:
        mine = [tuple(row[i : i + ngram]) for i in range(1, len(row) - ngram + 1)]
        seen += sum(run in runs for run in mine) >= SHARED_NGRAMS * len(mine)
    return seen / len(evaluation)


def token_rows(length: int) -> st.SearchStrategy[list[list[int]]]:
    return st.lists(st.lists(st.integers(0, 2), min_size=length, max_size=length), min_size=1, max_size=4)


@given(token_rows(9), token_rows(14), st.integers(1, 8))
def test_the_share_is_what_comparing_all_runs_gives(a: list[list[int]], b: list[list[int]], ngram: int) -> None:
    assert share_source(windows_of(a), windows_of(b), ngram=ngram) == seen_by_brute_force(a, b, ngram)


def test_a_warning_only_where_text_or_source_is_shared(tokenizer: PreTrainedTokenizerFast, text_file: Path) -> None:
    ask: dict[str, Any] = {"num_windows": 8, "length": 128, "seed": 0}
    calibrate = load_windows(parse_source("pydoc:calibrate"), tokenizer, **ask)
    evaluate = load_windows(parse_source("pydoc:evaluate"), tokenizer, **ask, placement="spread")
    assert share_source(calibrate, evaluate) == 0.0
    assert overlap_warning(calibrate, evaluate) is None
    same = load_windows(parse_source("pydoc:evaluate"), tokenizer, **{**ask, "seed": 1})
    assert "same source (pydoc:evaluate)" in str(overlap_warning(same, evaluate))
    # another name for a part of the same text, cut at other places
    excerpt = load_windows(parse_source(f"text:{text_file}"), tokenizer, **{**ask, "num_windows": 10_000})
    opening = load_windows(parse_source("pydoc:evaluate"), tokenizer, **ask, placement="first")
    assert share_source(excerpt, opening) == 1.0
    assert "100% of the evaluation windows" in str(overlap_warning(excerpt, opening))
