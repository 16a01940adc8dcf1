"""``--keep PATTERN=BITS``: modules whose bit width the user decides, not the allocation."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from lrpq.allocate.budget import UNQUANTIZED_BITS
from lrpq.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepRule:
    """Modules whose name matches ``pattern`` (fnmatch, with case) get ``bits``; 16 leaves them alone."""

    pattern: str
    bits: int

    def __str__(self) -> str:
        """The rule as the user writes it."""
        return f"{self.pattern}={self.bits}"


def parse_keep(text: str) -> KeepRule:
    """Read ``model.layers.0.*=8``.

    Raises:
        ConfigError: no pattern, or bits that are no whole number from 1 to 16.
    """
    pattern, separator, bits = text.rpartition("=")
    pattern, bits = pattern.strip(), bits.strip()
    if not separator or not pattern or not (bits.isascii() and bits.isdigit()):
        raise ConfigError(f"keep rule {text!r}: expected PATTERN=BITS such as 'model.layers.0.*=8'")
    if not 1 <= int(bits) <= UNQUANTIZED_BITS:
        raise ConfigError(f"keep rule {text!r}: expected bits from the candidates or {UNQUANTIZED_BITS}")
    return KeepRule(pattern=pattern, bits=int(bits))


def match_keep(rules: Sequence[KeepRule], names: Sequence[str]) -> Mapping[str, KeepRule]:
    """Return the rule of each module that one matches.

    Raises:
        ConfigError: a rule matches no module (near names are shown), or two rules disagree on
            one module's bits.
    """
    found: dict[str, KeepRule] = {}
    for rule in rules:
        matched = [name for name in names if fnmatchcase(name, rule.pattern)]
        if not matched:
            near = ", ".join(difflib.get_close_matches(rule.pattern, names, n=3, cutoff=0.0))
            raise ConfigError(f"keep rule '{rule}' matches no module; near names: {near}")
        for name in matched:
            other = found.setdefault(name, rule)
            if other.bits != rule.bits:
                raise ConfigError(f"keep rules '{other}' and '{rule}' both match {name}; make them disjoint")
    return found
