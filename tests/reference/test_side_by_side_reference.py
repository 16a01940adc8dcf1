"""Layers swept together against each by itself."""

from __future__ import annotations

import pytest
import torch

from lrpq.errors import QuantizationError
from lrpq.model.layers import Choice
from lrpq.quant import side_by_side
from lrpq.quant.factor import factorize
from lrpq.quant.gptq import gptq, loss
from lrpq.quant.grid import Grid
from lrpq.quant.side_by_side import quantize_side_by_side

CHOICES = [Choice(bits=3, group_size=32), Choice(bits=4, group_size=-1)]
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("most", [0, 96 * 100, 2**24])
def test_layers_side_by_side_come_out_as_alone(most: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """None, two and all of three together, on a CPU that stacks as a GPU does."""
    monkeypatch.setattr(side_by_side, "STACKED_ELEMENTS", most)
    monkeypatch.setattr(side_by_side, "_is_gpu", lambda W: True)
    g = torch.Generator().manual_seed(1)
    X = torch.randn(400, 96, generator=g) @ (torch.eye(96) + torch.randn(96, 96, generator=g) / 10)
    H = (X.T @ X / 400).to(device)
    weights = [torch.randn(rows, 96, generator=g).to(device) for rows in (64, 32, 70)]
    factor = factorize(H)
    swept: list[int] = []

    def counted(W: torch.Tensor, *rest: object, **options: object) -> object:
        swept.append(len(W))
        return gptq(W, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(side_by_side, "gptq", counted)
    layers = ((f"layer {i}", W) for i, W in enumerate(weights))
    found = list(quantize_side_by_side(layers, factor, CHOICES, grid=Grid.SIGNED))
    assert swept == ([64, 32, 70] if most == 0 else [166] if most == 2**24 else [96, 70])
    assert len(found) == 3
    for W, (again, codes) in zip(weights, found, strict=True):
        assert again is W
        for q, expected in zip(codes, gptq(W, factor, CHOICES, grid=Grid.SIGNED), strict=True):
            assert q.choice == expected.choice
            assert (q.codes == expected.codes).float().mean() > 0.995
            assert torch.equal(q.scales, expected.scales)
            losses = [float(loss(W, x.dequantize(), H).sum()) for x in (q, expected)]
            assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_on_a_cpu_each_layer_has_a_sweep_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    swept: list[int] = []

    def counted(W: torch.Tensor, *rest: object, **options: object) -> object:
        swept.append(len(W))
        return gptq(W, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(side_by_side, "gptq", counted)
    layers = ((f"layer {i}", torch.randn(rows, 32)) for i, rows in enumerate((4, 6)))
    list(quantize_side_by_side(layers, factorize(torch.eye(32)), [Choice(bits=4, group_size=32)]))
    assert swept == [4, 6]


def test_of_layers_swept_together_the_one_at_fault_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "_is_gpu", lambda W: True)
    layers = [("good", torch.ones(2, 32)), ("strange", torch.full((2, 32), torch.nan))]
    with pytest.raises(QuantizationError, match=r"^strange"):
        list(quantize_side_by_side(layers, factorize(torch.eye(32)), [Choice(bits=4, group_size=32)]))


def test_a_layer_of_another_input_is_named() -> None:
    factor = factorize(torch.eye(8))
    with pytest.raises(QuantizationError, match="strange"):
        list(quantize_side_by_side([("strange", torch.ones(2, 16))], factor, [Choice(bits=4, group_size=8)]))
