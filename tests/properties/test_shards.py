"""The merge tree gives the same sum for every way of sharing out the shards."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrpq.shards import assign, fold, root, split


def text_merge(a: str, b: str) -> str:
    return f"({a}{b})"


@given(num_shards=st.integers(1, 40), num_workers=st.integers(1, 12))
def test_order_of_merging_does_not_depend_on_the_workers(num_shards: int, num_workers: int) -> None:
    leaves = {(0, i): f"{i}," for i in range(num_shards)}
    expected = root(leaves, num_shards, text_merge)
    parts = {}
    for shards in assign(num_shards, num_workers):
        parts |= fold({(0, i): f"{i}," for i in shards}, num_shards, text_merge)
    assert root(parts, num_shards, text_merge) == expected
    assert expected.count(",") == num_shards


def test_tree_is_binary_over_the_index() -> None:
    assert root({(0, i): str(i) for i in range(5)}, 5, text_merge) == "(((01)(23))4)"


def test_sums_are_equal_to_the_byte_where_plain_order_is_not() -> None:
    values = np.random.default_rng(0).normal(size=(13, 50)).astype(np.float32) * 10.0 ** np.arange(13)[:, None]
    values = values.astype(np.float32)
    whole = root({(0, i): v for i, v in enumerate(values)}, 13, np.add)
    parts = {}
    for shards in assign(13, 4):
        parts |= fold({(0, i): values[i] for i in shards}, 13, np.add)
    assert root(parts, 13, np.add).tobytes() == whole.tobytes()
    assert whole.tobytes() != values[::-1].sum(axis=0, dtype=np.float32).tobytes()


def test_missing_shards_are_an_error() -> None:
    with pytest.raises(ValueError, match="missing"):
        root({(0, 0): 1, (0, 2): 1}, 3, lambda a, b: a + b)


@given(num_windows=st.integers(0, 300), num_shards=st.integers(1, 20))
def test_split_covers_every_window_once(num_windows: int, num_shards: int) -> None:
    assert [w for r in split(num_windows, num_shards) for w in r] == list(range(num_windows))
