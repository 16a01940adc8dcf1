"""JSON values that a careless reader trips over, and how they are put into a document."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Raw:
    """JSON text that no parsed value gives, such as NaN."""

    text: str


class Pairs(list[tuple[str, Any]]):
    """A JSON object as it is written: a key may occur twice."""


OUTSIDE = "/proc/self/cwd/outside"
"""Absolute name of the folder with the files that must not be read; the same for every process that runs there, so
that a case is the same bytes."""
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


def hostile(rng: random.Random) -> Any:
    """A JSON value that a careless reader trips over."""
    match rng.randrange(8):
        case 0:
            return rng.choice((None, True, False))
        case 1 | 2:
            return rng.choice(NUMBERS)
        case 3:
            return Raw(rng.choice(RAW))
        case 4:
            return rng.choice((f"{OUTSIDE}/canary.safetensors", "../outside/canary.safetensors", "../outside"))
        case 5:
            return rng.choice(([], Pairs(), [[]], [None], [1] * 5000, Pairs([("", 1)]), [rng.choice(SCALARS)]))
        case _:
            return rng.choice(TEXTS)


def mutate_json(raw: bytes, rng: random.Random) -> bytes:
    """Replace a value, or rename, drop, repeat or add a key, anywhere in the document.

    Raises:
        ValueError, RecursionError: not JSON any more.
    """
    document = json.loads(raw, object_pairs_hook=Pairs)
    return dumped(mutate_value(document, rng)).encode("utf-8", "surrogatepass")


def mutate_value(document: Any, rng: random.Random) -> Any:
    """The parsed document with one change."""
    holders = list(_holders(document))
    if not holders or rng.randrange(30) == 0:
        return hostile(rng)
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
                holder.insert(rng.randrange(len(holder) + 1), (key, hostile(rng)))
            case 3:
                holder.append((rng.choice(TEXTS), hostile(rng)))
            case 4:
                holder[at] = (key, holder[rng.randrange(len(holder))][1])
            case 5:
                holder[at] = (key, _neighbour(value, rng))
            case _:
                holder[at] = (key, hostile(rng))
    else:
        match rng.randrange(5):
            case 0:
                del holder[at]
            case 1:
                holder.insert(at, holder[at])
            case 2:
                holder[at] = _neighbour(holder[at], rng)
            case _:
                holder[at] = hostile(rng)
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
