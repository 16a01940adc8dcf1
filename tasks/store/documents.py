"""JSON of the store: one canonical text, a checksum in every document, strict reading.

A document is ``{"body": ..., "key": ..., "kind": ..., "schema": 2, "sha256": ...}``; the checksum covers everything
else. The key is the object's own, so that another run's document in its place is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from lrpq.errors import StoreError

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"
"""What a document may hold; tuples are written as lists, NaN and infinities are refused."""

SCHEMA_VERSION = 2
"""Version of every format in the store: documents, Parquet metadata, safetensors metadata."""

_MAX_DOCUMENT_BYTES = 64 * 1024 * 1024  # a manifest of 100,000 objects is about 20 MB


def plain_json(value: object, *, where: str = "value") -> JSON:
    """A copy made of dict, list, str, int, float, bool and None only.

    Raises:
        StoreError: anything else in it (also NaN, infinities and keys that are not strings), with the path to
            it.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise StoreError(f"{where} is {value!r}: JSON holds finite numbers only; leave it out or use null")
        return float(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise StoreError(f"{where} has the key {key!r}: keys must be strings")
        return {key: plain_json(item, where=f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item, where=f"{where}[{index}]") for index, item in enumerate(value)]
    raise StoreError(f"{where} is a {type(value).__name__}: expected null, bool, int, float, str, list or dict")


def canonical_text(value: JSON) -> str:
    """One text for one value: keys sorted, no spaces, ASCII; floats as repr."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sha256_text(text: str) -> str:
    """SHA-256 of the text's UTF-8 bytes, hexadecimal."""
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


def document_bytes(kind: str, body: Mapping[str, JSON], *, key: str) -> bytes:
    """The document as it is stored under a key; the same key, kind and body always give the same bytes."""
    sealed = _sealed(kind, plain_json(body, where=kind), key)
    return (json.dumps(sealed, sort_keys=True, indent=1, allow_nan=False) + "\n").encode("ascii")


def parse_document(raw: bytes, kind: str, *, key: str) -> dict[str, JSON]:
    """The body of a document.

    Raises:
        ValueError: not a whole, unchanged document of this kind, version and key.
    """
    if len(raw) > _MAX_DOCUMENT_BYTES:
        raise ValueError(f"it has {len(raw)} bytes, more than any document of the store")
    sealed = parse_object(raw)
    if sealed.get("kind") != kind:
        raise ValueError(f"it is of kind {_short(sealed.get('kind'))}, expected {kind!r}")
    if sealed.get("schema") != SCHEMA_VERSION:
        raise ValueError(f"its schema is {_short(sealed.get('schema'))}, this version reads {SCHEMA_VERSION}")
    body, written_as = sealed.get("body"), sealed.get("key")
    if not isinstance(body, dict) or not isinstance(written_as, str) or sealed != _sealed(kind, body, written_as):
        raise ValueError("its checksum does not fit its content")
    check_written_as(written_as, key)
    return body


def check_written_as(found: str | None, key: str) -> None:
    """Refuse an object that was written under another key, however whole it is.

    Raises:
        ValueError: it was.
    """
    if found != key:
        raise ValueError(f"it is the object {_short(found)}")


def parse_object(raw: bytes) -> dict[str, JSON]:
    """A JSON object, strictly: UTF-8, no key twice, no NaN or infinity.

    Raises:
        ValueError: anything else.
    """
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_no_key_twice,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"it is a JSON {type(value).__name__}, expected an object")
    return value


def _sealed(kind: str, body: JSON, key: str) -> dict[str, JSON]:
    content: dict[str, JSON] = {"body": body, "key": key, "kind": kind, "schema": SCHEMA_VERSION}
    return {**content, "sha256": sha256_text(canonical_text(content))}


def _no_key_twice(pairs: list[tuple[str, JSON]]) -> dict[str, JSON]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _no_constant(text: str) -> JSON:
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):  # 1e999
        raise ValueError(f"{text} is not a finite number")
    return value


def _short(value: JSON) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
