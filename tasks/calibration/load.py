"""One call from a parsed source to token windows."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lrpq.errors import CalibrationError
from tasks.calibration.documents import load_documents
from tasks.calibration.fetch import PIECE_CHARS
from tasks.calibration.sampling import self_windows
from tasks.calibration.sources import ParquetSource, SelfSource, Source
from tasks.calibration.token_rows import read_token_windows, token_column
from tasks.calibration.windows import Placement, Windows, check_request, tokenize_windows

# Spread windows need a text tokenised as one; beyond this many characters it is tokenised in pieces.
WHOLE_TEXT_CHARS = 1 << 26


def load_windows(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_windows: int,
    length: int,
    seed: int,
    placement: Placement = "random",
    text_column: str | None = None,
    vocab_size: int | None = None,
    model_dir: str | Path | None = None,
) -> Windows:
    """Read a source and cut it into windows.

    ``vocab_size`` bounds the ids of token columns (default: the tokenizer's size). ``model_dir`` is the
    model that ``self`` samples from. ``text_column`` switches the search for a column of token ids off.

    Raises:
        CalibrationError: the source cannot be read, or does not fill one window.
        ConfigError: impossible counts.
    """
    check_request(num_windows=num_windows, length=length, placement=placement)
    if isinstance(source, SelfSource):
        if model_dir is None:
            raise CalibrationError("self: no local model to sample from; name a source of text, such as text:FILE")
        return self_windows(model_dir, tokenizer, num_windows=num_windows, length=length, seed=seed)
    if isinstance(source, ParquetSource) and text_column is None:
        column = token_column(source)
        if column is not None:
            return read_token_windows(
                source,
                column=column,
                vocab_size=len(tokenizer) if vocab_size is None else vocab_size,
                num_windows=num_windows,
                length=length,
                seed=seed,
                placement=placement,
            )
    piece_chars = WHOLE_TEXT_CHARS if placement == "spread" else PIECE_CHARS
    return tokenize_windows(
        tokenizer,
        load_documents(source, text_column=text_column, piece_chars=piece_chars),
        num_windows=num_windows,
        length=length,
        seed=seed,
        placement=placement,
        source=str(source),
    )
