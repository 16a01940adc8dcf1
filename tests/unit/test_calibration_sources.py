"""Sources of text: what a user may write, and what is read from files, URLs, folders and Parquet."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi, constants
from hypothesis import given, settings
from hypothesis import strategies as st

from lrpq.errors import CalibrationError, ConfigError
from tasks.calibration import fetch, parse_source
from tasks.calibration.documents import load_documents
from tasks.calibration.pydoc import pydoc_documents, split_topics
from tasks.calibration.sources import (
    HubSource,
    ParquetSource,
    PydocSource,
    SelfSource,
    Source,
    TextSource,
)

HELLO = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]


def documents(text: str, **options: object) -> list[object]:
    return list(load_documents(parse_source(text), **options))


# ---- what the user writes ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("self", SelfSource()),
        ("text:/a/b.txt", TextSource(location="/a/b.txt")),
        ("text:https://host:80/b.txt", TextSource(location="https://host:80/b.txt")),
        ("pydoc:evaluate", PydocSource(part="evaluate")),
        ("parquet:s3://bucket/a.parquet", ParquetSource(location="s3://bucket/a.parquet")),
        ("hub:allenai/c4", HubSource(dataset="allenai/c4", config=None, split="train")),
        ("hub:allenai/c4:en", HubSource(dataset="allenai/c4", config="en", split="train")),
        ("hub:allenai/c4:en:validation", HubSource(dataset="allenai/c4", config="en", split="validation")),
        ("hub:allenai/c4::validation", HubSource(dataset="allenai/c4", config=None, split="validation")),
    ],
)
def test_every_form_is_parsed_and_written_back(text: str, source: Source) -> None:
    assert parse_source(text) == source
    assert parse_source(str(source)) == source


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("txt:/a/b.txt", "text:FILE_OR_URL"),
        ("parket:/a", "parquet:FILE_OR_URL"),
        ("pydocs:calibrate", "pydoc:calibrate"),
        ("hubb:x/y", "hub:DATASET"),
        ("https://host/a.txt", "text:https://host/a.txt"),
        ("https://host/a.parquet", "parquet:https://host/a.parquet"),
        ("pydoc:test", "pydoc:calibrate or pydoc:evaluate"),
        ("hub:a:b:c:d", "hub:DATASET[:CONFIG[:SPLIT]]"),
        ("hub:", "hub:DATASET[:CONFIG[:SPLIT]]"),
        ("self:x", "write 'self'"),
        ("", "text:FILE_OR_URL"),
        ("/no/such/file.txt", "text:FILE_OR_URL"),
    ],
)
def test_a_mistake_is_answered_with_what_to_write(text: str, advice: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_source(text)
    assert advice in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bare_path_is_text_and_a_folder_is_not(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.parquet").write_bytes(b"")
    assert parse_source(str(tmp_path / "a.txt")) == TextSource(location=str(tmp_path / "a.txt"))
    assert parse_source(str(tmp_path / "a.parquet")) == ParquetSource(location=str(tmp_path / "a.parquet"))
    with pytest.raises(ConfigError, match=re.escape(f"hub:{tmp_path}")):
        parse_source(str(tmp_path))


def test_a_name_too_long_for_the_file_system_is_no_crash() -> None:
    with pytest.raises(ConfigError):
        parse_source("x" * 5000)


@settings(max_examples=50)
@given(st.text(alphabet="selftxpydochub:/\0\n é", max_size=20))
def test_any_text_gives_a_source_or_one_line(text: str) -> None:
    message = ""
    try:
        parse_source(text)
    except ConfigError as error:
        message = str(error)
    assert "\n" not in message


# ---- text files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("piece_chars", [None, 1, 7, 1000])
def test_pieces_of_a_text_join_to_what_read_text_gives(tmp_path: Path, piece_chars: int | None) -> None:
    file = tmp_path / "t.txt"
    file.write_bytes("première ligne\r\nzweite Zeile ☃\n\n最後".encode() * 5)
    pieces = documents(f"text:{file}", piece_chars=piece_chars)
    assert "".join(map(str, pieces)) == file.read_text(encoding="utf-8")
    assert all(str(piece).endswith("\n") for piece in pieces[:-1])
    assert (len(pieces) == 1) == (piece_chars is None or piece_chars == 1000)


def test_reading_stops_where_the_reader_stops(tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    file.write_bytes(b"good line\n" * 20_000 + b"\xff\xfe")  # a whole read would fail on the last bytes
    stream = load_documents(TextSource(location=str(file)), piece_chars=10)
    assert next(stream) == "good line\n" * 2
    stream.close()
    with pytest.raises(CalibrationError, match=r"not UTF-8 text .byte 0xff."):
        documents(f"text:{file}")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"gone.txt: cannot be read"):
        documents(f"text:{tmp_path}/gone.txt")


def test_other_protocols_go_through_fsspec() -> None:
    import fsspec

    with fsspec.open("memory://calibration/t.txt", "wb") as file:
        file.write(b"from memory")
    assert documents("text:memory://calibration/t.txt") == ["from memory"]
    with pytest.raises(CalibrationError, match="cannot be opened"):
        documents("text:nosuch://a/b")


# ---- rows ----------------------------------------------------------------------------------------


def write_rows(file: Path, rows: list[dict[str, object]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_json_rows_are_parted_by_a_blank_line_and_empty_ones_left_out(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "t.jsonl", [{"text": "a"}, {"text": "  "}, {"text": None}, {"text": "b"}])
    assert documents(f"text:{file}") == ["a", "\n\nb"]


def test_the_text_column_is_found_once_or_named(tmp_path: Path) -> None:
    rows = [{"id": 1, "title": "t1", "body": "b1"}, {"id": 2, "title": None, "body": "b2"}]
    file = write_rows(tmp_path / "t.jsonl", rows)
    assert documents(f"text:{file}") == ["t1"]  # an empty title does not make the body the text
    assert documents(f"text:{file}", text_column="body") == ["b1", "\n\nb2"]
    with pytest.raises(CalibrationError, match=r"row 1: no column 'nope' among \['body', 'id', 'title'\]"):
        documents(f"text:{file}", text_column="nope")
    with pytest.raises(CalibrationError, match="row 1: column 'id' holds int"):
        documents(f"text:{file}", text_column="id")


def test_conversations_of_both_dialects_become_messages(tmp_path: Path) -> None:
    shared = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Good day"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}]
    chat = write_rows(tmp_path / "a.jsonl", [{"text": "x", "messages": HELLO}, {"messages": parts}])
    assert documents(f"text:{chat}") == [HELLO, HELLO[:1]]
    other = write_rows(tmp_path / "b.jsonl", [{"conversations": shared}])
    assert documents(f"text:{other}") == [HELLO]
    image = write_rows(tmp_path / "c.jsonl", [{"messages": [{"role": "user", "content": [{"type": "image"}]}]}])
    with pytest.raises(CalibrationError, match="row 1: message 1 has no role and text"):
        documents(f"text:{image}")


@pytest.mark.parametrize(
    ("line", "reason"), [('{"text": oops}', "line 2 is not JSON"), ("[1]", "line 2 is not a JSON object")]
)
def test_a_broken_json_row_is_named(tmp_path: Path, line: str, reason: str) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(CalibrationError, match=reason):
        documents(f"text:{file}")


def test_parquet_rows_are_documents(tmp_path: Path) -> None:
    table = pa.table({"n": [1, 2], "messages": [HELLO, HELLO[:1]]})
    pq.write_table(table, tmp_path / "t.parquet")
    assert documents(f"parquet:{tmp_path}/t.parquet") == [HELLO, HELLO[:1]]
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(CalibrationError, match=r"bad.parquet: not a readable Parquet file"):
        documents(f"parquet:{tmp_path}/bad.parquet")


# ---- hub -----------------------------------------------------------------------------------------


def test_a_local_folder_is_a_data_set(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [{"text": "a"}, {"text": "b"}])
    write_rows(tmp_path / "test.jsonl", [{"text": "c"}])
    assert documents(f"hub:{tmp_path}") == ["a", "\n\nb"]
    assert documents(f"hub:{tmp_path}::test") == ["c"]
    with pytest.raises(CalibrationError, match=r"Bad split: nope.*check the files of the folder"):
        documents(f"hub:{tmp_path}::nope")


def test_offline_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CalibrationError, match=r"hub:no/such::train: .*HF_HUB_OFFLINE is set") as caught:
        documents("hub:no/such")
    assert "\n" not in str(caught.value)


def test_an_unreachable_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # port 9 of this host refuses: the transport's own error must arrive as ours, before load_dataset retries
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert HfApi().endpoint == "http://127.0.0.1:9"
    monkeypatch.setattr("tasks.calibration.hub.datasets.load_dataset", _must_not_be_called)
    with pytest.raises(CalibrationError, match="hub:no/such::train: cannot be read from the hub") as caught:
        documents("hub:no/such")
    assert "text:FILE" in str(caught.value)
    assert "\n" not in str(caught.value)


def _must_not_be_called(*_args: object, **_options: object) -> None:
    raise AssertionError("load_dataset was called without a reachable hub")


# ---- URLs ----------------------------------------------------------------------------------------

TEXT = "erste Zeile\nzweite ☃\n" * 50


class _Files(BaseHTTPRequestHandler):
    """Serves ``files``; byte ranges only under /ranged/."""

    files: dict[str, bytes] = {}  # noqa: RUF012
    requests: list[tuple[str, str]] = []  # noqa: RUF012

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self.wfile.write(self._answer())

    def _answer(self) -> bytes:
        self.requests.append((self.command, self.path))
        body = self.files.get(self.path)
        if body is None:
            self.send_error(404)
            return b""
        wanted = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if self.path.startswith("/ranged/") and wanted:
            start, end = int(wanted[1]), min(int(wanted[2]), len(body) - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(body)}")
            body = body[start : end + 1]
        else:
            self.send_response(200)
        if self.path.startswith("/ranged/"):
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        return body

    def log_message(self, *_args: object) -> None:
        return


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(_Files, "files", {"/t.txt": TEXT.encode(), "/bad.txt": b"caf\xe9"})
    monkeypatch.setattr(_Files, "requests", [])
    with ThreadingHTTPServer(("127.0.0.1", 0), _Files) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


def test_text_from_a_url(server: str) -> None:
    assert documents(f"text:{server}/t.txt") == [TEXT]
    with pytest.raises(CalibrationError, match=r"gone.txt: cannot be read \(HTTP Error 404"):
        documents(f"text:{server}/gone.txt")
    with pytest.raises(CalibrationError, match=r"bad.txt: not UTF-8 text \(byte 0xe9\)"):
        documents(f"text:{server}/bad.txt")


def test_a_url_has_a_size_and_a_time_limit(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "TOTAL_TIMEOUT_SECONDS", -1.0)
    with pytest.raises(CalibrationError, match=r"t.txt: not read within"):
        documents(f"text:{server}/t.txt")
    monkeypatch.setattr(fetch, "TOTAL_TIMEOUT_SECONDS", 60.0)
    monkeypatch.setattr(fetch, "MAX_DOWNLOAD_BYTES", len(TEXT.encode()) - 1)
    with pytest.raises(CalibrationError, match=r"t.txt: larger than"):
        documents(f"text:{server}/t.txt")
    monkeypatch.setattr(fetch, "MAX_DOWNLOAD_BYTES", len(TEXT.encode()))
    assert documents(f"text:{server}/t.txt") == [TEXT]


@pytest.mark.parametrize("folder", ["", "/ranged"])
def test_parquet_from_a_url_with_and_without_ranges(server: str, tmp_path: Path, folder: str) -> None:
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "t.parquet")
    _Files.files[f"{folder}/t.parquet"] = (tmp_path / "t.parquet").read_bytes()
    assert documents(f"parquet:{server}{folder}/t.parquet") == ["a", "\n\nb"]
    with pytest.raises(CalibrationError, match=r"gone.parquet: cannot be read"):
        documents(f"parquet:{server}{folder}/gone.parquet")


# ---- the demo's text -----------------------------------------------------------------------------


def test_the_parts_of_the_reference_share_no_topic_and_no_paragraph() -> None:
    parts = split_topics()
    assert not set(parts["calibrate"]) & set(parts["evaluate"])
    assert [list(names) for names in parts.values()] == [sorted(names) for names in parts.values()]
    texts = {part: list(pydoc_documents(part)) for part in parts}
    words = {part: [" ".join(p.split()) for t in texts[part] for p in t.split("\n\n")] for part in texts}
    long = {part: [p for p in words[part] if len(p) >= 80] for part in words}
    assert not set(long["calibrate"]) & set(long["evaluate"])
    for part in texts:
        assert sum(map(len, texts[part])) >= 100_000
        assert len(long[part]) == len(set(long[part]))


def test_the_reference_loses_no_paragraph() -> None:
    from pydoc_data.topics import topics

    kept = {" ".join(p.split()) for part in split_topics() for t in pydoc_documents(part) for p in t.split("\n\n")}
    assert {" ".join(p.split()) for text in topics.values() for p in text.split("\n\n")} <= kept | {""}
    assert "".join(map(str, documents("pydoc:calibrate"))) == "\n\n".join(pydoc_documents("calibrate"))


def test_self_has_no_documents() -> None:
    with pytest.raises(CalibrationError, match="sample_windows"):
        documents("self")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "\\ud800"}', r"row 1: half a surrogate pair \(U\+D800\)"),
        ('{"text": ' + "1" * 5000 + "}", "line 1 is not JSON"),
        ('{"text": ' + "[" * 100_000 + "}", "line 1 is not JSON"),
        ('{"messages": [{"role": "user", "content": "a"}, 7]}', "row 1: message 2 is int"),
    ],
    ids=["surrogate", "number", "nesting", "message"],
)
def test_json_that_is_no_text_is_refused_by_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(CalibrationError, match=message):
        list(load_documents(parse_source(f"text:{path}")))
