"""What a user may name as calibration or evaluation text.

text:FILE_OR_URL                  plain UTF-8 text; rows when the name ends in .jsonl
pydoc:calibrate | pydoc:evaluate  the language reference that every CPython carries
hub:DATASET[:CONFIG[:SPLIT]]      through ``datasets``; DATASET may be a local folder
parquet:FILE_OR_URL               a column of token ids, of text or of chat messages
self                              sampled from the model itself
"""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from lrpq.errors import ConfigError

PydocPart: TypeAlias = Literal["calibrate", "evaluate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSource:
    """A text file, or a file of JSON rows where the name ends in ``.jsonl``."""

    location: str
    """A local path or a URL (http, https, or what fsspec knows, such as s3)."""

    def __str__(self) -> str:
        return f"text:{self.location}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PydocSource:
    """One of the two disjoint parts of CPython's own documentation topics."""

    part: PydocPart

    def __str__(self) -> str:
        return f"pydoc:{self.part}"


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSource:
    """A data set of the Hugging Face hub, or a local folder that ``datasets`` can read."""

    dataset: str
    config: str | None = None
    split: str = "train"

    def __str__(self) -> str:
        return f"hub:{self.dataset}:{self.config or ''}:{self.split}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ParquetSource:
    """A Parquet file with a column of token ids (``tokens``, ``input_ids``), of text or of messages."""

    location: str

    def __str__(self) -> str:
        return f"parquet:{self.location}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfSource:
    """Text sampled from the model that is quantized."""

    def __str__(self) -> str:
        return "self"


Source: TypeAlias = TextSource | PydocSource | HubSource | ParquetSource | SelfSource

FORMS = {
    "text": "text:FILE_OR_URL",
    "pydoc": "pydoc:calibrate",
    "hub": "hub:DATASET[:CONFIG[:SPLIT]]",
    "parquet": "parquet:FILE_OR_URL",
    "self": "self",
}


def parse_source(text: str) -> Source:
    """Read a source as the user writes it; the bare path of a file is text (or Parquet by its ending).

    Raises:
        ConfigError: an unknown prefix (the nearest known one is named), a missing or superfluous part.
    """
    text = text.strip()
    prefix, colon, rest = text.partition(":")
    if text == "self":
        return SelfSource()
    if colon and prefix in FORMS:
        return _parse_prefixed(text, prefix, rest)
    if os.path.isfile(text):  # unlike Path.is_file, false for a name that is too long
        return ParquetSource(location=text) if text.endswith(".parquet") else TextSource(location=text)
    raise ConfigError(_unknown(text, prefix))


def _parse_prefixed(text: str, prefix: str, rest: str) -> Source:
    if prefix == "self":
        raise ConfigError(f"{text!r}: 'self' takes no argument; write 'self'")
    if not rest:
        raise ConfigError(f"{text!r}: nothing follows the colon; write {FORMS[prefix]}")
    if prefix == "text":
        return TextSource(location=rest)
    if prefix == "parquet":
        return ParquetSource(location=rest)
    if prefix == "pydoc":
        for part in get_args(PydocPart):
            if rest == part:
                return PydocSource(part=part)
        raise ConfigError(f"{text!r}: no such part; write pydoc:calibrate or pydoc:evaluate")
    return _parse_hub(text, rest)


def _parse_hub(text: str, rest: str) -> HubSource:
    dataset, *options = rest.split(":")
    if len(options) > 2 or not dataset:
        raise ConfigError(f"{text!r}: expected {FORMS['hub']}, got {len(options) + 1} parts")
    config = options[0] if options else ""
    split = options[1] if len(options) == 2 else ""
    return HubSource(dataset=dataset, config=config or None, split=split or "train")


def _unknown(text: str, prefix: str) -> str:
    known = ", ".join(FORMS.values())
    if not text:
        return f"empty source of calibration text; write one of {known}"
    if "://" in text:
        kind = "parquet" if text.endswith(".parquet") else "text"
        return f"{text!r}: a URL needs its kind in front; did you mean {kind}:{text}?"
    if os.path.isdir(text):
        return f"{text!r} is a folder; did you mean hub:{text} (a data set in a folder)?"
    near = difflib.get_close_matches(prefix.lower(), FORMS, n=1, cutoff=0.5)
    if near:
        return f"{text!r}: unknown source {prefix!r}; did you mean {FORMS[near[0]]}?"
    return f"{text!r} is neither an existing file nor a known source; write one of {known}"
