"""Mutations of an artefact, which is a few small files: random bytes, and values that its format makes dangerous."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from . import parquet


@dataclass(frozen=True, slots=True)
class Link:
    """A symbolic link in place of a file."""

    target: str


Files: TypeAlias = "dict[str, bytes | Link]"
"""Path inside the artefact's folder -> content."""
ByteMutator: TypeAlias = Callable[[bytes, random.Random, str], bytes]
"""Content, generator, folder with the files that must not be read."""


@dataclass(frozen=True, slots=True)
class Raw:
    """JSON text that no parsed value gives, such as NaN."""

    text: str


class Pairs(list[tuple[str, Any]]):
    """A JSON object as it is written: a key may occur twice."""


LARGE = (2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**12, 10**30)
NUMBERS = (0, 1, -1, 2, 7, 255, 65536, *LARGE, *(-n for n in LARGE), 0.5, -0.0, 1e308, 5e-324)
TEXTS = (
    *("", "0", "x", "\ud800", "a\nb\r\u2028\x00", "\u202e", "a" * 20_000, "{}", "None", "re:", "NaN", "~nobody/x"),
    *("..", ".", "/", "../x", "/etc/passwd", "config.json", "model.safetensors", "x" * 300),
    *("re:^(a+)+$", "re:^(([a-z_.]|[a-z0-9_.])+)+!$", "re:(", "(?:" * 200, "re:" + "(" * 5000, "F32", "I4", "F8_E8M0"),
)
RAW = (
    *("NaN", "-Infinity", "1e999", "-1e999", "9" * 5000, "0." + "1" * 5000, "[" * 200_000 + "]" * 200_000),
    *('{"a":' * 50_000 + "1" + "}" * 50_000, "[" * 900 + "]" * 900, "[" * 990 + "]" * 990, '"\\ud800"', "1.0", "-0"),
)
SCALARS: tuple[Any, ...] = (None, True, False, *NUMBERS, *TEXTS, *map(Raw, RAW))


def hostile(rng: random.Random, outside: str) -> Any:
    """A JSON value that a careless reader trips over."""
    match rng.randrange(8):
        case 0:
            return rng.choice((None, True, False))
        case 1 | 2:
            return rng.choice(NUMBERS)
        case 3:
            return Raw(rng.choice(RAW))
        case 4:
            return rng.choice((f"{outside}/canary.safetensors", "../outside/canary.safetensors", "../outside"))
        case 5:
            return rng.choice(([], Pairs(), [[]], [None], [1] * 5000, Pairs([("", 1)]), [rng.choice(SCALARS)]))
        case _:
            return rng.choice(TEXTS)


# ---- bytes ---------------------------------------------------------------------------------------


def mutate_bytes(raw: bytes, rng: random.Random, outside: str) -> bytes:
    """Flip, overwrite, insert, delete, truncate, duplicate or swap; headers and footers more often than the middle."""
    if not raw:
        return rng.randbytes(rng.randrange(1, 100))
    changed = bytearray(raw)
    low, high = rng.choice(((0, len(raw)), (0, min(len(raw), 200)), (max(0, len(raw) - 1500), len(raw))))
    at = rng.randrange(low, high)
    span = rng.choice((1, 2, 4, 8, rng.randrange(1, 64), rng.randrange(1, 1 + len(raw))))
    other = rng.randrange(len(raw))
    match rng.randrange(11):
        case 0:
            changed[at] ^= 1 << rng.randrange(8)
        case 1:
            changed[at] = rng.randrange(256)
        case 2:
            changed[at : at + span] = rng.randbytes(min(span, len(raw) - at))
        case 3:
            changed[at:at] = rng.randbytes(span)
        case 4:
            del changed[at : at + span]
        case 5:
            del changed[at:]
        case 6:
            del changed[:at]
        case 7:
            changed[other:other] = changed[at : at + span]
        case 8:
            first, second = sorted((at, other))
            span = min(span, second - first, len(raw) - second)
            held = changed[first : first + span]
            changed[first : first + span] = changed[second : second + span]
            changed[second : second + span] = held
        case 9:
            changed[at : at + span] = rng.choice((b"\x00", b"\xff", b"\x80", b"\x7f")) * min(span, len(raw) - at)
        case _:
            number = rng.choice(LARGE) % 2**64
            changed[at : at + 8] = number.to_bytes(8, rng.choice(("little", "big")))
    return bytes(changed)


# ---- JSON ----------------------------------------------------------------------------------------


def mutate_json(raw: bytes, rng: random.Random, outside: str) -> bytes:
    """Replace a value, or rename, drop, repeat or add a key, anywhere in the document."""
    try:
        document = json.loads(raw, object_pairs_hook=Pairs)
    except (ValueError, RecursionError):  # a second mutation of the same file
        return mutate_bytes(raw, rng, outside)
    return dumped(mutate_value(document, rng, outside)).encode("utf-8", "surrogatepass")


def mutate_value(document: Any, rng: random.Random, outside: str) -> Any:
    """The parsed document with one change."""
    holders = list(_holders(document))
    if not holders or rng.randrange(30) == 0:
        return hostile(rng, outside)
    holder = rng.choice(holders)
    at = rng.randrange(len(holder))
    if isinstance(holder, Pairs):
        key, value = holder[at]
        match rng.randrange(9):
            case 0:
                del holder[at]
            case 1:
                holder[at] = (rng.choice((*TEXTS, rng.choice(holder)[0], key.upper(), key + "x")), value)
            case 2:
                holder.insert(rng.randrange(len(holder) + 1), (key, hostile(rng, outside)))
            case 3:
                holder.append((rng.choice(TEXTS), hostile(rng, outside)))
            case 4:
                holder[at] = (key, holder[rng.randrange(len(holder))][1])
            case 5:
                holder[at] = (key, _neighbour(value, rng))
            case _:
                holder[at] = (key, hostile(rng, outside))
    else:
        match rng.randrange(5):
            case 0:
                del holder[at]
            case 1:
                holder.insert(at, holder[at])
            case 2:
                holder[at] = _neighbour(holder[at], rng)
            case _:
                holder[at] = hostile(rng, outside)
    return document


def dumped(value: Any) -> str:
    """JSON text, repeated keys and raw text included."""
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{json.dumps(key)}:{dumped(item)}" for key, item in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(dumped, value)) + "]"
    return json.dumps(value)


def _neighbour(value: Any, rng: random.Random) -> Any:
    """A value close by, or the same one as another type."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return rng.choice((value + 1, value - 1, -value, value * 2, float(value), str(value), [value], value * 1000))
    if isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        return rng.choice((value[:at], value[:at] + "\0" + value[at:], value * 2, value.upper(), [value]))
    return rng.choice((Pairs(), [], value, [value]))


def _holders(value: Any) -> Iterator[Any]:
    """Every object and list that is not empty."""
    if isinstance(value, list):
        if value:
            yield value
        for item in value:
            yield from _holders(item[1] if isinstance(value, Pairs) else item)


# ---- safetensors ---------------------------------------------------------------------------------


SHAPES: tuple[list[Any], ...] = (
    *([], [0], [-1], [1], [2**32, 2**32], [2**62, 4], [2**63], [0, 2**62], [0, 2**63], [2**31, 0, 2**33], [1] * 100),
    *([1.0], [True], ["1"], [None], [[1]], [10**30], [2**40], [1] * 5000),
)
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "C64", "f32")


def mutate_safetensors(raw: bytes, rng: random.Random, outside: str) -> bytes:
    """Change length, header or data of a shard; the length mostly fits the changed header."""
    length = int.from_bytes(raw[:8], "little")
    if rng.randrange(8) == 0:
        wrong = (0, 1, length - 1, length + 1, length + 8, len(raw) - 8, len(raw), 100_000_001, *LARGE)
        return (max(0, rng.choice(wrong)) % 2**64).to_bytes(8, "little") + raw[8:]
    try:
        header = json.loads(raw[8 : 8 + length], object_pairs_hook=Pairs)
        entries = [entry for name, entry in header if name != "__metadata__" and isinstance(entry, Pairs)]
    except (ValueError, RecursionError, TypeError):
        return mutate_bytes(raw, rng, outside)
    entry = dict(rng.choice(entries)) if entries else {}
    body = raw[8 + length :]
    match rng.randrange(8):
        case 0:
            entry["shape"] = rng.choice(SHAPES)
        case 1:
            entry["dtype"] = rng.choice(DTYPES)
        case 2:
            begin, end = rng.choice((0, 4, len(body), -4, *LARGE)), rng.choice((0, 4, len(body), *LARGE))
            entry["data_offsets"] = rng.choice(([begin, end], [end, begin], [begin], [begin, end, end], "0"))
        case 3:
            other = dict(rng.choice(entries)) if entries else {}
            entry["data_offsets"] = other.get("data_offsets")
        case 4:
            extra = bytes(rng.choice((1, 4, 64)))
            body = rng.choice((body + extra, body[: -len(extra)], rng.randbytes(len(body)), b"\xff" * len(body)))
        case 5:
            name = rng.choice(("__metadata__", *TEXTS, "model.norm.weight"))
            header.append((name, Pairs([("dtype", "F32"), ("shape", [0]), ("data_offsets", [0, 0])])))
        case _:
            header = mutate_value(header, rng, outside)
    if entry and isinstance(header, Pairs) and entries:
        names = [at for at, (name, value) in enumerate(header) if name != "__metadata__" and isinstance(value, Pairs)]
        chosen = next((at for at in names if _same_place(header[at][1], entry)), None)
        if chosen is not None:
            header[chosen] = (header[chosen][0], Pairs(entry.items()))
    text = dumped(header).encode("utf-8", "surrogatepass")
    text += b" " * rng.choice((0, -len(text) % 8, -len(text) % 8, 3))
    return len(text).to_bytes(8, "little") + text + body


def _same_place(value: Any, entry: Mapping[str, Any]) -> bool:
    found = dict(value)
    return sum(found.get(key) == entry.get(key) for key in ("dtype", "shape", "data_offsets")) >= 2


# ---- text: TOML, rows of JSON --------------------------------------------------------------------


TOML_VALUES = (
    *("0", "-1", "1", "true", "inf", "nan", "1e308", "9" * 30, "9" * 5000, "0x" + "f" * 5000, "0b" + "1" * 300),
    *('""', '"x"', "'../x'", '"\\ud800"', '"\\u0000"', '"~nobody/x"', '"' + "a" * 20_000 + '"', '"""a\nb"""', "''"),
    *("[]", "{}", "[[]]", "[" * 100_000 + "]" * 100_000, "[" * 950 + "]" * 950, "{a=" * 300 + "1" + "}" * 300),
    *("1979-05-27", "1979-05-27T07:32:00Z", "07:32:00", "[1, 'a']", "[3, 3.5]", "{ a.b.c = 1 }", "['*=8']", "['=']"),
    *("['*=" + "9" * 5000 + "']", "'40GB'", "'" + "9" * 5000 + "GB'", "'1e9'", "'hub:a:b:c:d'", "'parquet:'"),
)


def mutate_toml(raw: bytes, rng: random.Random, outside: str) -> bytes:
    """Change a line: its value, its key or its section; or drop, repeat or move it."""
    lines = raw.decode("utf-8", "surrogateescape").split("\n")
    at = rng.randrange(len(lines))
    key, equals, _ = lines[at].partition("=")
    match rng.randrange(8):
        case 0:
            del lines[at]
        case 1:
            lines.insert(rng.randrange(len(lines) + 1), lines[at])
        case 2:
            lines[at] = rng.choice(("[x]", "[run]", "[[run]]", "[" + "a." * 3000 + "a]", "[run.calibration.x]", "["))
        case 3 if equals:
            lines[at] = rng.choice(("x", "''", "seed", "a" * 3000, "a." * 3000 + "a", '"\\n"', "é")) + "=1"
        case _:
            if equals:
                lines[at] = key + "= " + rng.choice(TOML_VALUES)
    return "\n".join(lines).encode("utf-8", "surrogateescape")


def mutate_jsonl(raw: bytes, rng: random.Random, outside: str) -> bytes:
    """Change one row as JSON, or the lines."""
    lines = raw.split(b"\n")
    at = rng.randrange(len(lines))
    match rng.randrange(8):
        case 0:
            del lines[at]
        case 1:
            lines.insert(at, rng.choice((b"\xff\xfe", b"\xef\xbb\xbf{}", b"\r", b"[]", b"0", b"\0", b"{" * 3000)))
        case 2:
            lines[at] += lines[rng.randrange(len(lines))]
        case _:
            lines[at] = mutate_json(lines[at] or b"{}", rng, outside)
    return b"\n".join(lines)


BY_ROLE: Mapping[str, tuple[ByteMutator, ...]] = {
    "json": (mutate_bytes, mutate_json, mutate_json, mutate_json),
    "safetensors": (mutate_bytes, mutate_safetensors, mutate_safetensors),
    "parquet": (mutate_bytes, parquet.mutate_footer, parquet.mutate_footer, parquet.mutate_page),
    "toml": (mutate_bytes, mutate_toml, mutate_toml, mutate_toml),
    "jsonl": (mutate_bytes, mutate_jsonl, mutate_jsonl),
    "text": (mutate_bytes,),
}


# ---- a folder ------------------------------------------------------------------------------------


def mutate_folder(files: Files, rng: random.Random, outside: str) -> None:
    """Drop, copy, swap or link files; in place."""
    names = sorted(files)
    name = rng.choice(names)
    match rng.randrange(4):
        case 0:
            del files[name]
        case 1:
            files[name] = files[rng.choice(names)]
        case 2:
            other = rng.choice(names)
            files[name], files[other] = files[other], files[name]
        case _:
            targets = (".", "missing", name, "/dev/null", "/dev/zero", "/etc/passwd", f"{outside}/{name}")
            files[name] = Link(rng.choice(targets))


def mutate(files: Files, roles: Mapping[str, str], rng: random.Random, outside: str, *, folder: bool) -> Files:
    """The artefact with one to three changes.

    ``roles`` says the format of the files that may be changed; ``folder`` allows changes of the folder.
    """
    changed = dict(files)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if folder and rng.randrange(12) == 0 and changed:
            mutate_folder(changed, rng, outside)
            continue
        name = rng.choice(sorted(roles))
        raw = changed.get(name)
        if isinstance(raw, bytes):
            changed[name] = rng.choice(BY_ROLE[roles[name]])(raw, rng, outside)
    return changed
