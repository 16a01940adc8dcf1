"""The fixed tree in which sums over shards are merged.

Floating-point addition is not associative: the order of the sums makes the result. Calibration is therefore cut into a
fixed number of shards, and sums are merged in one binary tree over the shard index, whoever holds the parts. A worker
merges the complete subtrees among its own shards; what is left is merged elsewhere, with the same result to the byte.

A node is (level, index): at level 0 the shards themselves; node (l, i) is the merge of (l - 1, 2i) and (l - 1, 2i + 1).
A node without a right sibling (the number of shards need not be a power of two) rises one level unchanged.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import TypeVar

Node = tuple[int, int]
T = TypeVar("T")


def fold(parts: Mapping[Node, T], num_shards: int, merge: Callable[[T, T], T]) -> dict[Node, T]:
    """Merge every pair of siblings present, until none is left.

    With all shards among ``parts`` the result is the single root.
    """
    nodes = dict(parts)
    level, width = 0, num_shards
    while width > 1:
        for index in range(0, width, 2):
            left, right, parent = (level, index), (level, index + 1), (level + 1, index // 2)
            if index + 1 == width and left in nodes:
                nodes[parent] = nodes.pop(left)
            elif left in nodes and right in nodes:
                nodes[parent] = merge(nodes.pop(left), nodes.pop(right))
        level, width = level + 1, (width + 1) // 2
    return nodes


def root(parts: Mapping[Node, T], num_shards: int, merge: Callable[[T, T], T]) -> T:
    """Merge to the root.

    Raises:
        ValueError: parts of some shards are missing.
    """
    nodes = fold(parts, num_shards, merge)
    if len(nodes) != 1:
        raise ValueError(f"shards are missing: only {sorted(nodes)} of {num_shards} shards could be merged")
    return next(iter(nodes.values()))


def assign(num_shards: int, num_workers: int) -> list[range]:
    """Contiguous ranges of shards, one a worker, as equal as possible; contiguous, so that subtrees are whole."""
    bounds = [num_shards * w // num_workers for w in range(num_workers + 1)]
    return [range(a, b) for a, b in itertools.pairwise(bounds)]


def split(num_windows: int, num_shards: int) -> list[range]:
    """Windows of each shard: contiguous and as equal as possible. Depends on nothing but the two numbers."""
    return assign(num_windows, num_shards)
