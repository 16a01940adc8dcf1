"""A source as a stream of documents: plain texts or chat conversations.

The texts of a source are meant to be concatenated as they come. A text file arrives in pieces; rows and
topics are documents of their own and carry the blank line that parts them from the one before.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import pyarrow.parquet as pq

from lrpq.errors import CalibrationError
from tasks.calibration.chat import MESSAGE_COLUMNS, Conversation, is_conversation, read_conversation
from tasks.calibration.fetch import PIECE_CHARS, open_seekable, text_lines, text_pieces
from tasks.calibration.parquet import parsing
from tasks.calibration.pydoc import pydoc_documents
from tasks.calibration.sources import HubSource, ParquetSource, PydocSource, SelfSource, Source, TextSource

Document: TypeAlias = str | Conversation

SEPARATOR = "\n\n"


def load_documents(
    source: Source, *, text_column: str | None = None, piece_chars: int | None = PIECE_CHARS
) -> Iterator[Document]:
    """Yield the documents of a source, reading no further than they are asked for.

    ``text_column`` names the column of a source with rows; without it ``messages``, ``conversations``,
    ``text`` or the first column of strings is taken, in this order. ``piece_chars`` bounds the pieces of a
    text file (None: one).

    Raises:
        CalibrationError: unreachable, unreadable, no such column; ``self`` has no documents.
    """
    if isinstance(source, TextSource) and not source.location.endswith(".jsonl"):
        yield from text_pieces(source.location, piece_chars=piece_chars)
    elif isinstance(source, PydocSource):
        yield from _separated(pydoc_documents(source.part))
    elif isinstance(source, SelfSource):
        raise CalibrationError("self: sampled windows have no documents; call sample_windows or self_windows")
    else:
        yield from _separated(_row_documents(source, text_column=text_column))


def _row_documents(source: TextSource | HubSource | ParquetSource, *, text_column: str | None) -> Iterator[Document]:
    column = text_column
    for number, row in enumerate(_rows(source), 1):
        where = f"{source}: row {number}"
        if column is None:
            column = _document_column(row)  # decided once: a row with an empty cell must not switch columns
        if column is None or column not in row:
            raise CalibrationError(
                f"{where}: no column {'of text or messages' if column is None else repr(column)} among "
                f"{sorted(row)}; name one of them with --text-column"
            )
        document = _document_in(row[column], column=column, where=where)
        if document is not None:
            _check_unicode(document, where=where)
            yield document


def _check_unicode(document: Document, *, where: str) -> None:
    """Refuse half a surrogate pair, which JSON can spell and no tokenizer can read."""
    texts = [document] if isinstance(document, str) else [part for m in document for part in (m["role"], m["content"])]
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            bad = f"U+{ord(text[error.start]):04X}"
            raise CalibrationError(f"{where}: half a surrogate pair ({bad}) is no text; repair or drop it") from error


def _document_in(cell: object, *, column: str, where: str) -> Document | None:
    """The document in a cell; None where it is empty."""
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        return None
    if isinstance(cell, str):
        return cell
    if isinstance(cell, Sequence) and not cell:
        return None
    if is_conversation(cell):
        return read_conversation(cell, where=where)
    raise CalibrationError(
        f"{where}: column {column!r} holds {type(cell).__name__}, expected text or a list of messages; name "
        "another with --text-column"
    )


def _document_column(row: Mapping[str, Any]) -> str | None:
    for column in MESSAGE_COLUMNS:
        if column in row and isinstance(row[column], list | None):
            return column
    if "text" in row:
        return "text"
    return next((column for column, cell in row.items() if isinstance(cell, str)), None)


def _separated(documents: Iterator[str] | Iterator[Document]) -> Iterator[Document]:
    prefix = ""
    for document in documents:
        yield prefix + document if isinstance(document, str) else document
        prefix = SEPARATOR


def _rows(source: TextSource | HubSource | ParquetSource) -> Iterator[Mapping[str, Any]]:
    if isinstance(source, TextSource):
        return _json_rows(source.location)
    if isinstance(source, ParquetSource):
        return _parquet_rows(source.location)
    from tasks.calibration.hub import hub_rows  # here: it imports datasets and pandas, and workers only read windows

    return hub_rows(source)


def _json_rows(location: str) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(text_lines(location), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, or deep nesting
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise CalibrationError(f"{location}: line {number} is not JSON ({reason}); repair or drop it") from error
        if not isinstance(row, dict):
            raise CalibrationError(f'{location}: line {number} is not a JSON object; expected {{"text": ...}}')
        yield row


def _parquet_rows(location: str) -> Iterator[Mapping[str, Any]]:
    with open_seekable(location) as stream:
        with parsing(location):
            batches = pq.ParquetFile(stream).iter_batches(batch_size=256)
        while True:
            with parsing(location):  # not around the yield: what readers of the rows raise is theirs
                batch = next(batches, None)
                rows = [] if batch is None else batch.to_pylist()
            if batch is None:
                return
            yield from rows
