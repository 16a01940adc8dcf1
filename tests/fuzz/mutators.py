"""Mutations of an artefact, which is a few small files: random bytes, and values that its format makes dangerous."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from . import parquet, sealed
from .values import LARGE, OUTSIDE, TEXTS, Pairs, dumped, mutate_json, mutate_value


@dataclass(frozen=True, slots=True)
class Link:
    """A symbolic link in place of a file."""

    target: str


Files: TypeAlias = "dict[str, bytes | Link]"
"""Path inside the artefact's folder -> content."""
ByteMutator: TypeAlias = Callable[[bytes, random.Random], bytes]


# ---- bytes ---------------------------------------------------------------------------------------


def mutate_bytes(raw: bytes, rng: random.Random) -> bytes:
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


# ---- safetensors ---------------------------------------------------------------------------------


SHAPES: tuple[list[Any], ...] = (
    *([], [0], [-1], [1], [2**32, 2**32], [2**62, 4], [2**63], [0, 2**62], [0, 2**63], [2**31, 0, 2**33], [1] * 100),
    *([1.0], [True], ["1"], [None], [[1]], [10**30], [2**40], [1] * 5000),
)
DTYPES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I32",
    "I16",
    "I8",
    "U8",
    "BOOL",
    "F8_E4M3",
    "F8_E8M0",
    "F4",
    "C64",
    "f32",
)


def mutate_safetensors(raw: bytes, rng: random.Random) -> bytes:
    """Change length, header or data of a shard; the length mostly fits the changed header.

    Raises:
        ValueError, IndexError, RecursionError: not a shard any more.
    """
    length = int.from_bytes(raw[:8], "little")
    if rng.randrange(8) == 0:
        wrong = (0, 1, length - 1, length + 1, length + 8, len(raw) - 8, len(raw), 100_000_001, *LARGE)
        return (max(0, rng.choice(wrong)) % 2**64).to_bytes(8, "little") + raw[8:]
    header = json.loads(raw[8 : 8 + length], object_pairs_hook=Pairs)
    if not isinstance(header, Pairs):
        raise ValueError("no header")
    body = raw[8 + length :]
    places = [at for at, (name, value) in enumerate(header) if name != "__metadata__" and isinstance(value, Pairs)]
    at, other = rng.choice(places), rng.choice(places)
    entry = dict(header[at][1])
    match rng.randrange(8):
        case 0:
            entry["shape"] = rng.choice(SHAPES)
        case 1:
            entry["dtype"] = rng.choice(DTYPES)
        case 2:
            begin, end = rng.choice((0, 4, len(body), -4, *LARGE)), rng.choice((0, 4, len(body), *LARGE))
            entry["data_offsets"] = rng.choice(([begin, end], [end, begin], [begin], [begin, end, end], "0"))
        case 3:
            entry["data_offsets"] = dict(header[other][1]).get("data_offsets")
        case 4:
            extra = bytes(rng.choice((1, 4, 64)))
            body = rng.choice((body + extra, body[: -len(extra)], rng.randbytes(len(body)), b"\xff" * len(body)))
        case 5:
            name = rng.choice(("__metadata__", *TEXTS, "model.norm.weight"))
            header.append((name, Pairs([("dtype", "F32"), ("shape", [0]), ("data_offsets", [0, 0])])))
        case _:
            header = mutate_value(header, rng)
            return _shard(header, body, rng)
    header[at] = (header[at][0], Pairs(entry.items()))
    return _shard(header, body, rng)


def _shard(header: Any, body: bytes, rng: random.Random) -> bytes:
    text = dumped(header).encode("utf-8", "surrogatepass")
    text += b" " * rng.choice((0, -len(text) % 8, -len(text) % 8, 3))
    return len(text).to_bytes(8, "little") + text + body


# ---- text: TOML, rows of JSON --------------------------------------------------------------------


TOML_VALUES = (
    *("0", "-1", "1", "true", "inf", "nan", "1e308", "9" * 30, "9" * 5000, "0x" + "f" * 5000, "0b" + "1" * 300),
    *('""', '"x"', "'../x'", '"\\ud800"', '"\\u0000"', '"~nobody/x"', '"' + "a" * 20_000 + '"', '"""a\nb"""', "''"),
    *("[]", "{}", "[[]]", "[" * 100_000 + "]" * 100_000, "[" * 950 + "]" * 950, "{a=" * 300 + "1" + "}" * 300),
    *("1979-05-27", "1979-05-27T07:32:00Z", "07:32:00", "[1, 'a']", "[3, 3.5]", "{ a.b.c = 1 }", "['*=8']", "['=']"),
    *("['*=" + "9" * 5000 + "']", "'40GB'", "'" + "9" * 5000 + "GB'", "'1e9'", "'hub:a:b:c:d'", "'parquet:'"),
)


def mutate_toml(raw: bytes, rng: random.Random) -> bytes:
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
            lines[at] = rng.choice(("[x]", "[run]", "[[run]]", "[" + "a." * 1000 + "a]", "[run.calibration.x]", "["))
        case 3 if equals:
            lines[at] = rng.choice(("x", "''", "seed", "a" * 3000, "a." * 1000 + "a", '"\\n"', "é")) + "=1"
        case _:
            if equals:
                lines[at] = key + "= " + rng.choice(TOML_VALUES)
    return "\n".join(lines).encode("utf-8", "surrogateescape")


def mutate_jsonl(raw: bytes, rng: random.Random) -> bytes:
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
            lines[at] = mutate_json(lines[at] or b"{}", rng)
    return b"\n".join(lines)


BY_ROLE: Mapping[str, tuple[ByteMutator, ...]] = {
    "json": (mutate_bytes, mutate_json, mutate_json, mutate_json),
    "safetensors": (mutate_bytes, mutate_safetensors, mutate_safetensors),
    "parquet": (mutate_bytes, parquet.mutate_footer, parquet.mutate_footer, parquet.mutate_page),
    "toml": (mutate_bytes, mutate_toml, mutate_toml, mutate_toml),
    "jsonl": (mutate_bytes, mutate_jsonl, mutate_jsonl),
    "text": (mutate_bytes,),
    "sealed-json": (sealed.mutate_document,),
    "sealed-tensors": (sealed.mutate_tensors,),
    "sealed-matrices": (sealed.mutate_matrices,),
}


# ---- a folder ------------------------------------------------------------------------------------


LINKS = (".", "missing", "config.json", "/dev/null", "/dev/zero", "/etc/passwd")
"""Where links that take a file's place may point, and nothing but what lies in the folder is found there."""
LINKS_OUT = (*LINKS, f"{OUTSIDE}/canary.safetensors", "../outside/canary.safetensors")


def mutate_folder(files: Files, links: Sequence[str], rng: random.Random) -> None:
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
            files[name] = Link(rng.choice(links))


def mutate(files: Files, roles: Mapping[str, str], rng: random.Random, *, links: Sequence[str]) -> Files:
    """The artefact with one to three changes.

    ``roles`` says the format of the files that may be changed; with ``links``, files may also be missing, swapped or
    such links.
    """
    changed = dict(files)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if links and rng.randrange(12) == 0 and changed:
            mutate_folder(changed, links, rng)
            continue
        name = rng.choice(sorted(roles))
        raw = changed.get(name)
        if isinstance(raw, bytes):
            mutator = rng.choice(BY_ROLE[roles[name]])
            try:
                changed[name] = mutator(raw, rng)
            except (ValueError, LookupError, TypeError, RecursionError, OSError):  # an earlier change left no structure
                changed[name] = mutate_bytes(raw, rng)
    return changed
