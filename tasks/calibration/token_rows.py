"""Parquet files whose rows are token windows already: used as they are, without BOS, template or tokenizer."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from lrpq.errors import CalibrationError
from tasks.calibration.fetch import open_seekable
from tasks.calibration.parquet import parsing
from tasks.calibration.sources import ParquetSource
from tasks.calibration.windows import (
    MAX_STREAM_TOKENS,
    POOL,
    Placement,
    Tokens,
    Windows,
    check_request,
    choose_windows,
    tokens_digest,
    too_short,
)

TOKEN_COLUMNS = ("tokens", "input_ids")


def token_column(source: ParquetSource) -> str | None:
    """The column of token ids in a Parquet file (``tokens`` or ``input_ids``, a list of integers), or None.

    Raises:
        CalibrationError: not a readable Parquet file.
    """
    with open_seekable(source.location) as stream, parsing(source):
        schema = pq.ParquetFile(stream).schema_arrow
    for name in TOKEN_COLUMNS:
        if name in schema.names and _holds_token_ids(schema.field(name).type):
            return name
    return None


def read_token_windows(
    source: ParquetSource,
    *,
    column: str,
    vocab_size: int,
    num_windows: int,
    length: int,
    seed: int,
    placement: Placement = "random",
) -> Windows:
    """Take rows as windows: the first ``length`` ids of each chosen row.

    Rows are chosen as ``tokenize_windows`` chooses windows of conversations; reading stops once the pool is
    full.

    Raises:
        CalibrationError: no rows, a row shorter than ``length``, an id outside ``[0, vocab_size)``, a
            damaged file.
    """
    check_request(num_windows=num_windows, length=length, placement=placement)
    limits = {"first": num_windows, "random": num_windows * POOL, "spread": MAX_STREAM_TOKENS // length}
    limit_rows = limits[placement]
    rows: list[Tokens] = []
    exhausted = True
    with open_seekable(source.location) as stream, parsing(source):
        for batch in pq.ParquetFile(stream).iter_batches(batch_size=64, columns=[column]):
            for cell in batch.column(0):
                rows.append(_window(cell, source=source, row=len(rows) + 1, vocab_size=vocab_size, length=length))
            if len(rows) >= limit_rows:
                exhausted = False
                break
    if not rows:
        raise CalibrationError(too_short(str(source), found=0, length=length))
    rows = rows[:limit_rows]
    chosen = choose_windows(len(rows), num_windows=num_windows, seed=seed, placement=placement)
    tokens = torch.from_numpy(np.stack([rows[i] for i in chosen]))
    return Windows(
        tokens=tokens,
        source=str(source),
        documents_digest=tokens_digest(tokens),
        num_documents=len(rows),
        stream_tokens=len(rows) * length,
        asked_windows=num_windows,
        exhausted=exhausted,
    )


def _holds_token_ids(kind: pa.DataType) -> bool:
    listed = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(listed and pa.types.is_integer(kind.value_type))


def _window(cell: pa.ListScalar, *, source: ParquetSource, row: int, vocab_size: int, length: int) -> Tokens:
    found = 0 if cell.values is None else len(cell.values)
    if found < length:
        raise CalibrationError(
            f"{source}: row {row} holds {found} tokens, {length} needed for one window; use a shorter length"
        )
    window = np.array(cell.values.slice(0, length).to_pylist(), dtype=object)
    wrong = [i for i in window if i is None or not 0 <= i < vocab_size]
    if wrong:
        raise CalibrationError(
            f"{source}: row {row} holds the token id {wrong[0]}, outside the vocabulary of {vocab_size}; it "
            "was made with another tokenizer"
        )
    return window.astype(np.int64)
