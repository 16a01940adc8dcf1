"""Scales as float8: every number is the nearest one, the search finds the best ones, and files hold them exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lrpq.errors import CheckpointError, QuantizationError
from lrpq.model.layers import Choice, all_choices
from lrpq.quant.factor import factorize
from lrpq.quant.gptq import gptq, loss_of
from lrpq.quant.grid import Grid, QuantizedWeight, absmax_scales, code_range
from lrpq.quant.packing import pack, storage_bits, unpack
from lrpq.quant.refit import refit
from lrpq.quant.rtn import round_to_nearest
from lrpq.quant.scale_search import search_scales
from lrpq.quant.stored_scales import dtype_of, nearest, storable

NUMBERS = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
NUMBERS = NUMBERS[torch.isfinite(NUMBERS) & (NUMBERS != 0)]
"""All that a float8 scale can be."""


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def are_float8(s: Tensor) -> bool:
    return bool(torch.isin(s.double(), NUMBERS).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_nearest_float8_number_by_trying_all(dtype: torch.dtype) -> None:
    x = numbers(4000, seed=1).sign() * torch.exp2(numbers(4000, seed=2) * 5).to(dtype)
    found = nearest(x, 8)
    assert found.dtype == dtype
    assert are_float8(found)
    distance = (x.double().unsqueeze(1) - NUMBERS).abs().amin(1)
    same_sign = (found > 0) == (x > 0)
    # a number next to zero keeps its sign, which costs it at most the distance to the nearest of the other sign
    assert torch.equal((x.double() - found.double()).abs()[same_sign], distance[same_sign])
    assert same_sign.all()
    assert torch.equal(nearest(found, 8), found)


def test_the_ends_of_float8_hold_what_lies_beyond() -> None:
    x = torch.tensor([1e9, -1e9, 1e-9, -1e-9, 448.0, 2.0**-9])
    assert nearest(x, 8).tolist() == [448.0, -448.0, 2.0**-9, -(2.0**-9), 448.0, 2.0**-9]
    assert storable(torch.tensor([1e38]), 8, 16).item() <= torch.finfo(torch.bfloat16).max / 128


def test_other_widths_are_refused() -> None:
    with pytest.raises(QuantizationError, match="scales of 4 bits"):
        dtype_of(4)


@pytest.mark.parametrize("grid", [Grid.SYMMETRIC, Grid.SIGNED])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_the_search_is_as_good_as_trying_every_float8_number(bits: int, grid: Grid) -> None:
    W, importance = numbers(64, 256, seed=bits), numbers(256, seed=9).exp()
    choice = Choice(bits=bits, group_size=32, scale_bits=8)
    scales = search_scales(W, importance, choice, grid=grid)
    assert are_float8(scales)

    def errors(s: Tensor) -> Tensor:
        w = W.double().view(64, 8, 32)
        q = (w / s.double().unsqueeze(-1)).round().clamp(*code_range(bits)) * s.double().unsqueeze(-1)
        return ((w - q).square() * importance.double().view(8, 32)).sum(-1)

    tried = NUMBERS if grid is Grid.SIGNED else NUMBERS[NUMBERS > 0]
    best = torch.stack([errors(torch.full((64, 8), float(s))) for s in tried]).amin(0)
    found = errors(scales)
    assert (found >= best * (1 - 1e-9)).all()
    assert found.sum() < 1.02 * best.sum()
    assert (found <= errors(absmax_scales(W, choice)) * (1 + 1e-6)).all()


def test_weights_near_the_ends_of_float8_are_searched_as_they_will_be_stored() -> None:
    """Below 2^-6 float8 has steps of 2^-9: a search that forgets the unit of a group would find scales between them."""
    W = numbers(16, 64, seed=3) * 2.0**-6
    scales = search_scales(W, torch.ones(64), Choice(bits=4, group_size=32, scale_bits=8), grid=Grid.SIGNED)
    assert are_float8(scales)
    assert scales.abs().amax() < 2.0**-6


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_refit_stays_on_float8_and_never_loses(bits: int) -> None:
    X = numbers(200, 96, seed=4) @ numbers(96, 96, seed=5)
    H = X.T @ X / 200
    W = numbers(40, 96, seed=6)
    choice = Choice(bits=bits, group_size=32, scale_bits=8)
    (quantized,) = gptq(W, factorize(H), [choice], grid=Grid.SIGNED)
    refitted = refit(W, quantized, H)
    assert are_float8(refitted.weight.scales)
    before, after = loss_of(W, quantized, H), loss_of(W, refitted.weight, H)
    assert (after <= before * (1 + 1e-5)).all()
    if bits == 2:  # of wider codes float8's steps are longer than what a refit would change
        assert after.sum() < 0.99 * before.sum()


def test_packed_scales_take_eight_bits_and_come_back() -> None:
    choice = Choice(bits=3, group_size=32, scale_bits=8)
    quantized = round_to_nearest(numbers(24, 96, seed=7), choice)
    packed = pack(quantized)
    assert packed["weight_scale"].dtype == torch.float8_e4m3fn
    stored = packed["weight_packed"].nbytes + packed["weight_scale"].nbytes
    assert storage_bits(24, 96, choice) == 8 * stored
    assert storage_bits(24, 96, choice) == storage_bits(24, 96, Choice(bits=3, group_size=32)) - 24 * 3 * 8
    back = unpack(packed, choice)
    assert torch.equal(back.scales, quantized.scales)
    assert torch.equal(back.codes, quantized.codes)
    assert back.choice == choice


def test_scales_that_float8_does_not_hold_are_refused() -> None:
    made = round_to_nearest(numbers(24, 96, seed=8), Choice(bits=3, group_size=32))
    wrong = QuantizedWeight(codes=made.codes, scales=made.scales, choice=Choice(bits=3, group_size=32, scale_bits=8))
    with pytest.raises(QuantizationError, match=r"are no torch.float8_e4m3fn numbers"):
        pack(wrong)


def test_scales_of_another_type_than_the_choice_says_are_refused() -> None:
    choice = Choice(bits=3, group_size=32, scale_bits=8)
    packed = pack(round_to_nearest(numbers(24, 96, seed=7), choice))
    with pytest.raises(CheckpointError, match=r"scales are torch.bfloat16, those of a 3b/g32/f8 layer"):
        unpack({**packed, "weight_scale": packed["weight_scale"].bfloat16()}, choice)
    with pytest.raises(CheckpointError, match=r"scales are torch.float8_e4m3fn"):
        unpack(packed, Choice(bits=3, group_size=32))


def test_one_scale_a_row_keeps_sixteen_bits() -> None:
    found = all_choices((3, 4), (32, -1), scale_bits=8)
    assert [(c.bits, c.group_size, c.scale_bits) for c in found] == [(3, 32, 8), (3, -1, 16), (4, 32, 8), (4, -1, 16)]
    assert [str(c) for c in found[:2]] == ["3b/g32/f8", "3b/channel"]
