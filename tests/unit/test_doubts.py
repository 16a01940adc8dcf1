"""Questions that wait are all answered, in the order in which they were asked."""

from __future__ import annotations

import pytest
import torch

from lrpq.errors import QuantizationError
from lrpq.model.layers import Choice
from lrpq.quant.doubts import Doubts, Judge
from lrpq.quant.factor import factorize
from lrpq.quant.gptq import Rounding
from lrpq.quant.grid import QuantizedWeight
from lrpq.quant.polish import Polisher

CHOICE = Choice(bits=3, group_size=-1)


def refuse(limit: float, name: str) -> Judge:
    def judge(found: list[float]) -> None:
        if max(found) > limit:
            raise QuantizationError(f"{name}: {max(found):g}")

    return judge


def test_the_first_that_refuses_speaks_and_each_sees_its_own_numbers() -> None:
    doubts = Doubts()
    doubts.ask([torch.tensor(1.0), torch.tensor(2.0)], refuse(2.0, "first"))
    doubts.ask([torch.tensor(5.0, dtype=torch.float64)], refuse(4.0, "second"))
    doubts.ask([torch.tensor(9.0)], refuse(4.0, "third"))
    with pytest.raises(QuantizationError, match="second: 5"):
        doubts.settle()
    doubts.settle()  # nothing is asked twice


def rows(seed: int) -> torch.Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))


def test_roundings_and_polishes_are_refused_when_they_are_settled() -> None:
    x = torch.randn(100, 16, generator=torch.Generator().manual_seed(1))
    H, doubts = x.T @ x / 100, Doubts()
    rounding = Rounding(factorize(H), [CHOICE], doubts=doubts, name="down")
    polisher = Polisher(H, doubts=doubts, name="down")
    (found,) = rounding(rows(0))
    (polished,) = polisher(rows(0), [found], rounds=1)
    doubts.settle()
    assert isinstance(polished.weight, QuantizedWeight)
    broken = rows(0)
    broken[3, 4] = torch.nan
    rounding(broken)
    with pytest.raises(QuantizationError, match=r"down: its weight is not finite"):
        doubts.settle()
    polisher(broken, [found], rounds=1)
    with pytest.raises(QuantizationError, match=r"down: its target is not finite"):
        doubts.settle()
