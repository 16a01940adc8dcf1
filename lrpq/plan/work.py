"""Work: how much of each kind of computing something takes, and how long a machine needs for it.

A kind is a text. ``matmul:bfloat16:2048`` are FLOPs of products whose inner sizes are about so wide, ``factor`` FLOPs
of Cholesky factorisations; ``vector`` are bytes written by the elementwise operations of a block's passes and by
softmaxes, ``wide`` those written by plain float32 operations; ``pack`` are codes packed or unpacked. The loops of the
quantizer are neither: ``search``, ``columns``, ``descent`` and ``refit`` are elements visited, ``column-steps``,
``descent-steps`` and ``refit-steps`` dependent steps, which cost launches whatever their size.
``trellis-steps:3`` are rows that Viterbi's algorithm goes down one after another, with 3 bits a symbol: on a CPU in one
thread, on a GPU in as many segments at once as it takes. ``disk-read``, ``disk-write``, ``store-read``,
``store-write``, ``matrix-read`` and ``matrix-write`` are bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

MATMUL = "matmul"
FACTOR = "factor"
VECTOR = "vector"
COUNTED = "counted"
"""FLOPs that a counter of matrix products sees and whose time is in another kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Amounts by kind; adds and scales."""

    amounts: Mapping[str, float] = field(default_factory=dict)

    def __add__(self, other: Work) -> Work:
        found = dict(self.amounts)
        for kind, amount in other.amounts.items():
            found[kind] = found.get(kind, 0.0) + amount
        return Work(amounts=found)

    def __mul__(self, times: float) -> Work:
        return Work(amounts={kind: amount * times for kind, amount in self.amounts.items()})

    __rmul__ = __mul__

    @property
    def flops(self) -> float:
        """FLOPs of matrix products and factorisations (a multiplication and an addition are two)."""
        return sum(n for kind, n in self.amounts.items() if kind.split(":")[0] in (MATMUL, FACTOR, COUNTED))

    def seconds(self, rates: Mapping[str, float]) -> float:
        """Time on one worker.

        Args:
            rates: kind -> units a second; products are taken at the rate of the nearest width that is known.

        Raises:
            KeyError: a kind without a rate.
        """
        return sum(
            amount / rates[nearest(kind, rates)] for kind, amount in self.amounts.items() if amount and kind != COUNTED
        )


NOTHING = Work()


def work(**amounts: float) -> Work:
    """Work of some kinds; a hyphen in a kind's name is written as an underscore."""
    return Work(amounts={kind.replace("_", "-"): float(amount) for kind, amount in amounts.items()})


def matmul(flops: float, *, dtype: str, width: int) -> Work:
    """Products in ``dtype`` whose smaller inner size is about ``width``."""
    return Work(amounts={f"{MATMUL}:{dtype}:{width}": float(flops)})


def total(parts: Iterable[Work]) -> Work:
    """Sum of all parts."""
    found: dict[str, float] = {}
    for part in parts:
        for kind, amount in part.amounts.items():
            found[kind] = found.get(kind, 0.0) + amount
    return Work(amounts=found)


def nearest(kind: str, rates: Mapping[str, float]) -> str:
    """The kind among ``rates`` that prices ``kind``: of products, that of the nearest width in proportion.

    Raises:
        KeyError: none does.
    """
    name, *rest = kind.split(":")
    if name != MATMUL:
        if kind not in rates:
            raise KeyError(kind)
        return kind
    dtype, width = rest[0], int(rest[1])
    known = [int(other.split(":")[2]) for other in rates if other.startswith(f"{MATMUL}:{dtype}:")]
    if not known:
        raise KeyError(kind)
    return f"{MATMUL}:{dtype}:{min(known, key=lambda w: max(w, width) / min(w, width))}"
