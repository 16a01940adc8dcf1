"""The demo's text: the language reference that every CPython carries, in two disjoint parts.

Topics of ``pydoc_data`` contain one another (``compound`` holds ``if``, ``for``, ``try``; ``specialnames``
holds ``customization``), so dealing whole topics to two parts would calibrate on what is measured. Topics
that share a paragraph therefore go to the same part, and a paragraph is kept once.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import lru_cache

from lrpq.errors import CalibrationError
from tasks.calibration.sources import PydocPart

# Shorter paragraphs (grammar headings, "Changed in version 3.9:") recur between unrelated topics.
SHARED_CHARS = 80


def pydoc_documents(part: PydocPart) -> Iterator[str]:
    """Yield one text per topic of the part, sorted by topic, each paragraph once.

    The split depends on the Python version alone. Raises CalibrationError where CPython was built without
    topics.
    """
    topics = _topics()
    seen: set[str] = set()
    for topic in split_topics()[part]:
        kept = [p for p in _paragraphs(topics[topic]) if _is_new(p, seen)]
        if kept:
            yield "\n\n".join(kept)


@lru_cache(maxsize=1)
def split_topics() -> dict[PydocPart, tuple[str, ...]]:
    """Topic names of each part: connected topics, largest first, to the part with less text so far."""
    topics = _topics()
    parts: dict[PydocPart, list[str]] = {"calibrate": [], "evaluate": []}
    chars: dict[PydocPart, int] = {"calibrate": 0, "evaluate": 0}
    sizes = {names: _unique_chars(names, topics) for names in _connected(topics)}
    for names in sorted(sizes, key=lambda names: (-sizes[names], names)):
        part: PydocPart = "calibrate" if chars["calibrate"] <= chars["evaluate"] else "evaluate"
        parts[part] += names
        chars[part] += sizes[names]
    return {part: tuple(sorted(names)) for part, names in parts.items()}


def _topics() -> dict[str, str]:
    try:
        module = importlib.import_module("pydoc_data.topics")
    except ImportError as error:
        raise CalibrationError(
            "pydoc: this Python carries no pydoc_data.topics; use text:FILE, or a Python with its documentation"
        ) from error
    topics: dict[str, str] = module.topics
    return topics


def _paragraphs(text: str) -> list[str]:
    return [p for p in text.strip("\n").split("\n\n") if p.strip()]


def _key(paragraph: str) -> str | None:
    """The paragraph without its indentation and line breaks; None where it is too short to identify a text."""
    words = " ".join(paragraph.split())
    return words if len(words) >= SHARED_CHARS else None


def _is_new(paragraph: str, seen: set[str]) -> bool:
    key = _key(paragraph)
    if key is None:
        return True
    if key in seen:
        return False
    seen.add(key)
    return True


def _unique_chars(names: tuple[str, ...], topics: dict[str, str]) -> int:
    seen: set[str] = set()
    return sum(len(p) for name in names for p in _paragraphs(topics[name]) if _is_new(p, seen))


def _connected(topics: dict[str, str]) -> list[tuple[str, ...]]:
    """Sets of topics linked by shared paragraphs, each sorted."""
    parent = {topic: topic for topic in topics}

    def root(topic: str) -> str:
        while parent[topic] != topic:
            topic = parent[topic]
        return topic

    first_owner: dict[str, str] = {}
    for topic in sorted(topics):
        for paragraph in _paragraphs(topics[topic]):
            key = _key(paragraph)
            if key is not None:
                parent[root(topic)] = root(first_owner.setdefault(key, topic))
    groups: dict[str, list[str]] = {}
    for topic in sorted(topics):
        groups.setdefault(root(topic), []).append(topic)
    return [tuple(group) for group in groups.values()]
