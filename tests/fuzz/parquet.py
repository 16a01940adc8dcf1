"""Mutations of Parquet files: any field of the footer, page headers, and pages behind a checksum that fits."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from tasks.store.thrift import (
    BINARY,
    DOUBLE,
    FALSE,
    I32,
    I64,
    INTEGERS,
    LIST,
    SET,
    STRUCT,
    TRUE,
    Struct,
    decode,
    encode,
    field,
)

MAGIC = b"PAR1"
ROW_GROUPS, KEY_VALUES, COLUMNS, META = 4, 5, 1, 3
CODEC, TOTAL_COMPRESSED, DATA_PAGE, DICTIONARY_PAGE = 4, 7, 9, 11
OFFSETS = (9, 10, 11)
UNCOMPRESSED_SIZE, COMPRESSED_SIZE, CRC = 2, 3, 4
MAX_PAGE = 1 << 20
CODECS = {1: "snappy", 2: "gzip", 6: "zstd"}
SIZES = (0, 1, -1, 7, 255, 65_536, 2**20, 2**27, 2**29, 2**30, 2**31 - 1, 2**31, -(2**31), 2**40, 2**62, 2**63 - 1)


def mutate_footer(raw: bytes, rng: random.Random) -> bytes:
    """Change a field of the footer; its length is made to fit.

    Raises:
        ValueError, IndexError: not a Parquet file any more.
    """
    footer, start = read_footer(raw)
    _change(footer, rng)
    return with_footer(raw[:start], footer)


def mutate_page(raw: bytes, rng: random.Random) -> bytes:
    """Change a page's header, or its content with a checksum that fits; all offsets are made to fit.

    Raises:
        ValueError, IndexError: not a Parquet file any more.
    """
    footer, start = read_footer(raw)
    columns = [chunk for group in _items(footer, ROW_GROUPS) for chunk in _items(group, COLUMNS)]
    chunk = rng.choice(columns)
    meta = field(chunk, META)[2]
    begins = [entry[2] for entry in meta if entry[0] in (DATA_PAGE, DICTIONARY_PAGE)]
    at = rng.choice(begins)
    header, body = decode(raw, at)
    size = field(header, COMPRESSED_SIZE)[2]
    content = raw[body : body + size]
    if rng.randrange(2):
        _change(header, rng)
    else:
        content = _changed_content(content, field(meta, CODEC)[2], header, rng)
    page = encode(header) + content
    delta = len(page) - (body + size - at)
    for other in columns:
        for entry in field(other, META)[2]:
            if entry[0] in OFFSETS and entry[2] > at:
                entry[2] += delta
    if rng.randrange(8):
        field(meta, TOTAL_COMPRESSED)[2] += delta
    return with_footer(raw[:at] + page + raw[body + size : start], footer)


def _changed_content(content: bytes, codec: int, header: Struct, rng: random.Random) -> bytes:
    """The page with a few changed bytes, compressed again, its sizes and its checksum fitting."""
    name = CODECS.get(codec)
    size = field(header, UNCOMPRESSED_SIZE)[2]
    if not 0 <= size <= MAX_PAGE:
        raise ValueError("an earlier change left no size of a page")
    plain = bytearray(pa.decompress(content, size, codec=name, asbytes=True) if name and size else content)
    for _ in range(rng.choice((1, 1, 2, 5))):
        if plain:
            at = rng.randrange(min(len(plain), rng.choice((8, 64, len(plain)))))
            plain[at] = rng.choice((0, 1, 2, 127, 128, 255, rng.randrange(256)))
    if rng.randrange(4) == 0:
        del plain[rng.randrange(len(plain) + 1) :]
    content = pa.compress(bytes(plain), codec=name, asbytes=True) if name else bytes(plain)
    field(header, UNCOMPRESSED_SIZE)[2] = len(plain)
    field(header, COMPRESSED_SIZE)[2] = len(content)
    for entry in header:
        if entry[0] == CRC:
            crc = zlib.crc32(content)
            entry[2] = crc - 2**32 if crc >= 2**31 else crc
    return content


def _change(fields: Struct, rng: random.Random) -> None:
    """Change one field anywhere in the struct; in place."""
    structs = list(_structs(fields))
    chosen = rng.choice(structs)
    if not chosen:
        chosen.append([1, I64, rng.choice(SIZES)])
        return
    entry = rng.choice(chosen)
    _, kind, value = entry
    match rng.randrange(12):
        case 0:
            chosen.remove(entry)
        case 1:
            chosen.append([rng.randrange(1, 16), BINARY, b"../outside/canary.parquet"])
            chosen.sort(key=lambda item: item[0])
        case 2:
            entry[1:] = [I32, rng.choice(SIZES)]
        case _:
            entry[2] = _other(kind, value, rng)


def _other(kind: int, value: Any, rng: random.Random) -> Any:
    if kind in (TRUE, FALSE):
        return not value
    if kind in INTEGERS:
        return rng.choice((*SIZES, value + 1, value - 1, value * 2, value * 1000, -value, rng.randrange(12)))
    if kind in (BINARY, DOUBLE):
        at = rng.randrange(len(value) + 1)
        longer = value[:at] + bytes([rng.randrange(256)]) + value[at:]
        return value[:8] if kind == DOUBLE else rng.choice((longer, value[:at], value * 2, b"\xff\xfe", b"a" * 5000))
    if kind in (LIST, SET):
        inner, values = value
        at = rng.randrange(len(values) + 1)
        return (inner, rng.choice(([], values[:at], values + values[:at], values[::-1], values[:1] * 3000)))
    return value


def _structs(fields: Struct) -> Iterator[Struct]:
    yield fields
    for _, kind, value in fields:
        if kind == STRUCT:
            yield from _structs(value)
        elif kind == LIST and value[0] == STRUCT:
            for item in value[1]:
                yield from _structs(item)


def _items(fields: Struct, number: int) -> list[Struct]:
    return list(field(fields, number)[2][1])


def read_footer(raw: bytes) -> tuple[Struct, int]:
    """The footer of a file, and where it begins.

    Raises:
        ValueError, IndexError: there is none.
    """
    length = int.from_bytes(raw[-8:-4], "little")
    start = len(raw) - 8 - length
    if raw[-4:] != MAGIC or start < 4:
        raise ValueError("no footer")
    footer, end = decode(raw, start)
    if end != len(raw) - 8:
        raise ValueError("the footer has another length")
    return footer, start


def with_footer(front: bytes, footer: Struct) -> bytes:
    """The file: what stands before the footer, and the footer."""
    text = encode(footer)
    return front + text + len(text).to_bytes(4, "little") + MAGIC
