"""Thrift's compact protocol, as far as Parquet's footers and page headers need it: read, change, write again.

A struct is a list of [field id, type, value]; a list is (type of its elements, values).
"""

from __future__ import annotations

from typing import Any, TypeAlias

TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)
INTEGERS = (I16, I32, I64)
Struct: TypeAlias = "list[list[Any]]"


def decode(raw: bytes, at: int = 0) -> tuple[Struct, int]:
    """The struct that begins at ``at``, and where it ends.

    Raises:
        ValueError, IndexError: it is not one.
    """
    fields: Struct = []
    number = 0
    while raw[at]:
        kind, delta = raw[at] & 15, raw[at] >> 4
        at += 1
        if delta:
            number += delta
        else:
            number, at = _zigzag(raw, at)
        if kind in (TRUE, FALSE):
            value: Any = kind == TRUE
        else:
            value, at = _value(raw, at, kind)
        fields.append([number, kind, value])
    return fields, at + 1


def encode(fields: Struct) -> bytes:
    """The struct's bytes."""
    out = bytearray()
    before = 0
    for number, kind, value in fields:
        if kind in (TRUE, FALSE):
            kind = TRUE if value else FALSE
        if 0 < number - before < 16:
            out.append((number - before) << 4 | kind)
        else:
            out.append(kind)
            out += _varint(_zig(number))
        before = number
        if kind not in (TRUE, FALSE):
            out += _encoded(kind, value)
    out.append(0)
    return bytes(out)


def field(fields: Struct, number: int) -> list[Any]:
    """The entry of a field; what is written into it changes the struct.

    Raises:
        ValueError: there is none.
    """
    for entry in fields:
        if entry[0] == number:
            return entry
    raise ValueError(f"no field {number}")


def _value(raw: bytes, at: int, kind: int) -> tuple[Any, int]:
    if kind == BYTE:
        return raw[at], at + 1
    if kind in INTEGERS:
        return _zigzag(raw, at)
    if kind == DOUBLE:
        return raw[at : at + 8], at + 8
    if kind == BINARY:
        length, at = _unsigned(raw, at)
        if at + length > len(raw):
            raise ValueError("a text ends behind the end")
        return raw[at : at + length], at + length
    if kind in (LIST, SET):
        inner, count = raw[at] & 15, raw[at] >> 4
        at += 1
        if count == 15:
            count, at = _unsigned(raw, at)
        if count > len(raw):
            raise ValueError("a list ends behind the end")
        values = []
        for _ in range(count):
            if inner in (TRUE, FALSE):
                value, at = raw[at], at + 1
            else:
                value, at = _value(raw, at, inner)
            values.append(value)
        return (inner, values), at
    if kind == STRUCT:
        return decode(raw, at)
    raise ValueError(f"type {kind}")


def _encoded(kind: int, value: Any) -> bytes:
    if kind == BYTE:
        return bytes([value & 255])
    if kind in INTEGERS:
        return _varint(_zig(value))
    if kind == DOUBLE:
        return bytes(value)
    if kind == BINARY:
        return _varint(len(value)) + bytes(value)
    if kind in (LIST, SET):
        inner, values = value
        head = bytes([len(values) << 4 | inner]) if len(values) < 15 else bytes([0xF0 | inner]) + _varint(len(values))
        return head + b"".join(bytes([item]) if inner in (TRUE, FALSE) else _encoded(inner, item) for item in values)
    return encode(value)


def _unsigned(raw: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = raw[at]
        at += 1
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return number, at
        if shift > 70:
            raise ValueError("a number does not end")


def _zigzag(raw: bytes, at: int) -> tuple[int, int]:
    number, at = _unsigned(raw, at)
    return (number >> 1) ^ -(number & 1), at


def _zig(number: int) -> int:
    return (number << 1 if number >= 0 else (-number << 1) - 1) % 2**64


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)
