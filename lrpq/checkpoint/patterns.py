"""Regular expressions that name modules: exactly those meant, by all the names they go by, and as few as possible."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from lrpq.model.layers import LinearSpec

_NUMBER = re.compile(r"\\\.(\d+)(?=\\\.|$)")  # the first part of an escaped name that is a number


def natural_key(name: str) -> tuple[tuple[bool, int, str], ...]:
    """Sort key that puts ``layers.2`` before ``layers.10``."""
    return tuple((part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split("."))


def expert_patterns(spec: LinearSpec) -> tuple[str, ...]:
    """Regular expressions for the experts of a block: the loaded module that holds them, and their layers on disk.

    All projections match, whatever they are called: vLLM asks for ``gate_proj`` also where the disk says ``w1``.
    """
    module = spec.name.rsplit(".", 2)[0]
    on_disk = sorted({stored.rsplit(".", 3)[0] for stored in spec.stored})
    return (re.escape(module), *(re.escape(stem) + r"\.\d+\.\w+" for stem in on_disk))


def patterns(name: str, spec: LinearSpec | None) -> tuple[str, ...]:
    """Regular expressions of all the names that a module goes by."""
    if spec is None:
        return (re.escape(name),)
    if spec.routed:
        return expert_patterns(spec)
    on_disk = [stored.removesuffix(".weight") for stored in spec.stored]
    return tuple(re.escape(alias) for alias in dict.fromkeys([name, *on_disk]))


def anchored_patterns(modules: Iterable[tuple[str, ...]]) -> list[str]:
    """Anchored patterns that match exactly ``modules``: one for all the layers of a kind, whatever their names.

    One pattern a module would be exact too, but Python keeps 512 compiled patterns and the loader tries every
    pattern on every module: with the 560 linear layers of a 70B model each try would compile anew. Names that a
    module goes by elsewhere share its pattern, as the loader warns of patterns that match nothing.
    """
    layers: dict[tuple[tuple[str, str], ...], dict[str, None]] = {}
    targets: set[str] = set()
    for aliases in modules:
        matches = [match for alias in aliases if (match := _NUMBER.search(alias))]
        numbers = {match.group(1) for match in matches}
        if len(numbers) == 1 and len(matches) == len(aliases):
            around = tuple((match.string[: match.start(1)], match.string[match.end(1) :]) for match in matches)
            layers.setdefault(around, {}).update(dict.fromkeys(numbers))
        else:
            targets.add(_anchored(aliases))
    for around, indices in layers.items():
        number = f"(?:{'|'.join(indices)})" if len(indices) > 1 else next(iter(indices))
        targets.add(_anchored([before + number + after for before, after in around]))
    return sorted(targets)


def _anchored(aliases: Sequence[str]) -> str:
    return f"^{aliases[0]}$" if len(aliases) == 1 else f"^(?:{'|'.join(aliases)})$"
