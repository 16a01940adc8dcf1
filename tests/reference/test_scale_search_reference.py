"""The scale search against the same search written out: one scale after another, float64, errors by rounding anew."""

import pytest
import torch
from torch import Tensor

from lrpq.model.layers import Choice
from lrpq.quant import scale_search
from lrpq.quant.grid import BITS, Grid, code_range
from lrpq.quant.scale_search import search_scales, search_scales_transposed

ROWS, WIDTH, GROUPS = 96, 64, 3


def weights(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    normal = torch.randn(ROWS, GROUPS * WIDTH, generator=generator)
    if kind == "normal":
        return normal
    tails = torch.randn(4, ROWS, GROUPS * WIDTH, generator=generator).square().mean(0)
    return normal / tails.sqrt()  # Student's t


def importance() -> Tensor:
    return torch.randn(GROUPS * WIDTH, generator=torch.Generator().manual_seed(6)).mul(1.5).exp()


def codes_of(w: Tensor, s: Tensor, bits: int) -> Tensor:
    return (w / s.unsqueeze(-1)).round().clamp(*code_range(bits))


def error_of(w: Tensor, s: Tensor, v: Tensor, bits: int) -> Tensor:
    """Of every group [rows, groups]."""
    return (v * (w - codes_of(w, s, bits) * s.unsqueeze(-1)).square()).sum(-1)


def plain_search(w: Tensor, v: Tensor, bits: int, grid: Grid) -> Tensor:
    """w [rows, groups, width], v [groups, width], float64; scales of bfloat16."""
    high = w.amax(-1)
    low = -w.amin(-1)
    largest = torch.maximum(high, low)
    signs = [torch.ones_like(largest)]
    if grid is Grid.SIGNED:
        signs = [signs[0], -signs[0]] if bits <= 3 else [torch.where(high > low, -1.0, 1.0)]
    best = (largest / (2 ** (bits - 1) - 0.5)).bfloat16().double()
    for sign in signs:
        for divisor in scale_search.divisors(bits, WIDTH):
            s = (sign * largest / divisor).bfloat16().double()
            best = torch.where(error_of(w, s, v, bits) < error_of(w, best, v, bits), s, best)
    for _ in range(scale_search.refits(bits)):
        q = codes_of(w, best, bits)
        s = ((v * w * q).sum(-1) / (v * q * q).sum(-1)).bfloat16().double()
        best = torch.where(error_of(w, s, v, bits) < error_of(w, best, v, bits), s, best)
    return best


@pytest.mark.parametrize("kind", ["normal", "student"])
@pytest.mark.parametrize("grid", [Grid.SYMMETRIC, Grid.SIGNED])
@pytest.mark.parametrize("bits", BITS)
def test_as_good_as_the_plain_search(bits: int, grid: Grid, kind: str) -> None:
    """Nearly every scale is the same, and the loss of all together is within a thousandth at every width."""
    W, v = weights(kind), importance()
    w, by_group = W.double().view(ROWS, GROUPS, WIDTH), v.double().view(GROUPS, WIDTH)
    plain = plain_search(w, by_group, bits, grid)
    found = search_scales(W, v, Choice(bits=bits, group_size=WIDTH), grid=grid).double()
    assert float((found == plain).double().mean()) > 0.98
    losses = [float(error_of(w, s, by_group, bits).sum()) for s in (found, plain)]
    assert losses[0] < 1.001 * losses[1]
    # and scales that are a twentieth off would not pass
    assert float(error_of(w, found * 1.05, by_group, bits).sum()) > 1.001 * losses[1]


@pytest.mark.parametrize("grid", list(Grid))
def test_several_choices_are_searched_as_each_alone(grid: Grid) -> None:
    W, v = weights("student"), importance()
    choices = [Choice(bits=bits, group_size=size) for size in (64, -1, 32) for bits in (8, 2, 4)]
    together = search_scales_transposed(W.T.contiguous(), v, choices, grid=grid)
    for choice, scales in zip(choices, together, strict=True):
        assert torch.equal(scales, search_scales(W, v, choice, grid=grid))
