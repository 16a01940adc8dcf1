"""Whether all values are finite: wherever the one that is not lies, in every dtype that a checkpoint has."""

import pytest
import torch

from lrpq.finite import all_finite

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [0, 1, 7, 1000, 65_535, 65_536])
def test_one_bad_value_is_found_wherever_it_lies(dtype: torch.dtype, bad: float, where: int) -> None:
    values = torch.randn(65_537, generator=torch.Generator().manual_seed(where)).to(dtype)
    values[3], values[4] = torch.finfo(dtype).max, torch.finfo(dtype).min
    assert all_finite(values)
    values[where] = bad
    assert not all_finite(values)


def test_nan_is_found_among_infinities() -> None:
    assert not all_finite(torch.tensor([float("-inf"), float("nan"), float("inf")]))
    assert not all_finite(torch.tensor(float("nan")))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.bool])
def test_integers_are_finite(dtype: torch.dtype) -> None:
    assert all_finite(torch.ones(3, dtype=dtype))


def test_no_values_are_finite() -> None:
    assert all_finite(torch.empty(0, 4))
