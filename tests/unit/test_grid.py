"""Grids: what a quantized weight means, and that the scale search finds what it should."""

import math

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize as library_dequantize

from lrpq.errors import QuantizationError
from lrpq.model.layers import Choice
from lrpq.quant import scale_search as search_module
from lrpq.quant.grid import Grid, QuantizedWeight, absmax_scales, code_range, ends, fetch, largest, zero_points
from lrpq.quant.rtn import round_to_nearest
from lrpq.quant.scale_search import search_scales

BITS = [2, 3, 4, 5, 6, 8]


def weights(d_out: int, d_in: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(seed))


def importance_of(d_in: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(d_in, generator=torch.Generator().manual_seed(seed)).mul(1.5).exp()


def group_errors(W: torch.Tensor, scales: torch.Tensor, importance: torch.Tensor, choice: Choice) -> torch.Tensor:
    """sum_j importance_j (w_j - q_j)^2 of every group, written out in float64."""
    groups = scales.shape[1]
    w = W.double().view(len(W), groups, -1)
    s = scales.double().unsqueeze(-1)
    low, high = code_range(choice.bits)
    q = (w / s).round().clamp(low, high) * s
    return ((w - q).square() * importance.double().view(groups, -1)).sum(-1)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("grid", [Grid.SYMMETRIC, Grid.SIGNED])
def test_dequantize_equals_compressed_tensors(bits: int, dtype: torch.dtype, group_size: int, grid: Grid) -> None:
    choice = Choice(bits=bits, group_size=group_size)
    quantized = round_to_nearest(weights(24, 96), choice, importance=importance_of(96), grid=grid)
    strategy = {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=True, dynamic=False, **strategy)
    theirs = library_dequantize(x_q=quantized.codes, scale=quantized.scales.to(dtype), args=args)
    assert theirs.dtype == dtype
    assert torch.equal(quantized.dequantize(dtype), theirs)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [64, -1])
def test_search_is_close_to_a_dense_one_and_never_worse_than_absmax(bits: int, group_size: int) -> None:
    W, importance, choice = weights(200, 256), importance_of(256), Choice(bits=bits, group_size=group_size)
    found = search_scales(W, importance, choice)
    assert found.dtype == torch.bfloat16
    assert found.shape == (200, choice.groups(256))
    errors = group_errors(W, found, importance, choice)
    absmax = absmax_scales(W, choice)
    assert (errors <= group_errors(W, absmax, importance, choice) * (1 + 1e-5)).all()

    largest = W.view(200, choice.groups(256), -1).abs().amax(-1)
    dense = torch.full_like(errors, torch.inf)
    for divisor in torch.linspace(0.7, 3.5, 400).mul(2 ** (bits - 1)).tolist():
        scales = (largest / divisor).bfloat16()
        dense = torch.minimum(dense, group_errors(W, scales, importance, choice))
    allowed = {2: 1.02, 3: 1.02, 4: 1.03, 5: 1.06, 6: 1.10, 8: 1.35}[bits]
    assert float(errors.sum() / dense.sum()) < allowed


def test_the_search_weighs_columns_by_importance() -> None:
    W, choice = weights(64, 64), Choice(bits=3, group_size=64)
    importance = torch.full((64,), 1e-3)
    importance[:8] = 1.0
    aware = group_errors(W, search_scales(W, importance, choice), importance, choice).sum()
    blind = group_errors(W, search_scales(W, torch.ones(64), choice), importance, choice).sum()
    assert aware < 0.6 * blind


def test_signed_scales_beat_positive_ones() -> None:
    W, importance = weights(300, 64), torch.ones(64)
    for bits, gain in ((2, 0.90), (3, 0.90), (4, 0.93)):
        choice = Choice(bits=bits, group_size=64)
        signed = search_scales(W, importance, choice, grid=Grid.SIGNED)
        assert (signed < 0).any()
        assert (signed > 0).any()
        ratio = (
            group_errors(W, signed, importance, choice).sum()
            / group_errors(W, search_scales(W, importance, choice), importance, choice).sum()
        )
        assert ratio < gain


def test_a_grid_is_found_again() -> None:
    """Weights that lie on a grid of bf16 scales are represented exactly."""
    for bits in BITS:
        low, high = code_range(bits)
        generator = torch.Generator().manual_seed(bits)
        codes = torch.randint(low, high + 1, (40, 2, 64), generator=generator)
        codes[..., 0], codes[..., 1] = low, high  # the whole range is in use
        scales = torch.rand(40, 2, 1, generator=generator).add(0.5).bfloat16().float()
        W = (codes * scales).view(40, 128)
        quantized = round_to_nearest(W, Choice(bits=bits, group_size=64), importance=torch.ones(128))
        relative = (quantized.dequantize() - W).square().sum() / W.square().sum()
        assert relative < 1e-12 if bits <= 4 else relative < 1e-4


@pytest.mark.parametrize("grid", list(Grid))
@pytest.mark.parametrize("bits", BITS)
def test_zeros_get_a_finite_scale_and_stay_zero(bits: int, grid: Grid) -> None:
    W = weights(6, 128)
    W[:3, :64] = 0
    W[5] = 0
    quantized = round_to_nearest(W, Choice(bits=bits, group_size=64), importance=importance_of(128), grid=grid)
    assert torch.isfinite(quantized.scales).all()
    assert (quantized.scales != 0).all()
    assert (quantized.scales[5] == 1).all()
    Q = quantized.dequantize()
    assert (Q[:3, :64] == 0).all()
    assert (Q[5] == 0).all()


@pytest.mark.parametrize("factor", [1e-38, 1e-20, 1e20, 1e35])
def test_extreme_magnitudes_stay_finite(factor: float) -> None:
    W = weights(8, 64) * factor
    for choice in (Choice(bits=2, group_size=64), Choice(bits=8, group_size=32)):
        quantized = round_to_nearest(W, choice, importance=torch.ones(64))
        assert torch.isfinite(quantized.dequantize()).all()
        assert (quantized.scales != 0).all()


def test_zero_importance_takes_the_absmax_scale() -> None:
    W, choice = weights(5, 64), Choice(bits=4, group_size=64)
    assert torch.equal(search_scales(W, torch.zeros(64), choice), absmax_scales(W, choice))


def test_chunks_do_not_change_the_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    W, importance = weights(700, 192), importance_of(192)
    choices = [Choice(bits=3, group_size=64), Choice(bits=4, group_size=-1)]
    for grid in Grid:
        whole = [search_scales(W.double(), importance, c, grid=grid) for c in choices]
        with monkeypatch.context() as patch:
            patch.setattr(search_module, "_CPU_CHUNK", 20_000)
            patch.setattr(search_module, "_CPU_PART", 4096)
            parts = [search_scales(W.double(), importance, c, grid=grid) for c in choices]
        assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_asymmetric_grid_uses_the_whole_range() -> None:
    W = weights(50, 64).abs() + 0.2  # one-sided: a symmetric grid wastes half of its codes
    choice = Choice(bits=4, group_size=64)
    asymmetric = round_to_nearest(W, choice, grid=Grid.ASYMMETRIC)
    assert asymmetric.zero_points is not None
    assert torch.equal(asymmetric.zero_points, zero_points(W, choice))
    assert (asymmetric.zero_points == -8).all()
    error = (asymmetric.dequantize() - W).square().sum()
    assert error < 0.5 * (round_to_nearest(W, choice, importance=torch.ones(64)).dequantize() - W).square().sum()


def test_rtn_with_absmax_scales_is_the_library_default() -> None:
    from compressed_tensors.quantization.utils import calculate_qparams

    W, choice = weights(16, 128), Choice(bits=4, group_size=64)
    grouped = W.view(16, 2, 64)
    args = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=64)
    theirs, _ = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
    assert torch.equal(round_to_nearest(W, choice).scales, theirs.bfloat16())


def test_ragged_shapes() -> None:
    for d_out, d_in in ((1, 1), (1, 7), (5, 1), (3, 577)):
        W = weights(d_out, d_in)
        quantized = round_to_nearest(W, Choice(bits=4, group_size=-1), importance=torch.ones(d_in))
        assert quantized.codes.shape == (d_out, d_in)
        assert quantized.scales.shape == (d_out, 1)
        assert (quantized.dequantize() - W).square().sum() < 0.03 * W.square().sum()


def test_errors_name_the_layer_and_the_way_out() -> None:
    with pytest.raises(QuantizationError, match=r"q_proj: group size 128 does not divide its 576.*\[16, 32, 64\]"):
        search_scales(weights(2, 576), torch.ones(576), Choice(bits=4, group_size=128), name="q_proj")
    with pytest.raises(QuantizationError, match="9 bits"):
        search_scales(weights(2, 64), torch.ones(64), Choice(bits=9, group_size=64))
    broken = weights(2, 64)
    broken[1, 3] = torch.nan
    with pytest.raises(QuantizationError, match="o_proj: its weight is not finite"):
        round_to_nearest(broken, Choice(bits=4, group_size=64), name="o_proj")
    with pytest.raises(QuantizationError, match="importance is not finite"):
        search_scales(weights(2, 64), torch.full((64,), torch.inf), Choice(bits=4, group_size=64))


def test_split_takes_stacked_layers_apart() -> None:
    W, choice = weights(12, 64), Choice(bits=3, group_size=32)
    parts = round_to_nearest(W, choice).split([8, 3, 1])
    assert [len(p.codes) for p in parts] == [8, 3, 1]
    assert torch.equal(torch.cat([p.dequantize() for p in parts]), round_to_nearest(W, choice).dequantize())
    alone: QuantizedWeight = round_to_nearest(W[8:11], choice)
    assert torch.equal(parts[1].codes, alone.codes)


def test_numbers_of_several_kinds_are_fetched_exactly_and_in_order() -> None:
    third = torch.tensor(1 / 3, dtype=torch.float64)
    single, half = torch.tensor(0.1), torch.tensor(-3.0).bfloat16()
    assert fetch(single, torch.tensor(True), third, half, torch.tensor(2**40)) == [
        float(single), 1.0, 1 / 3, -3.0, 2.0**40,
    ]  # fmt: skip
    tensors = [torch.tensor([-2.0, 1.0]), torch.tensor([3.0]).bfloat16(), torch.tensor([1.0, torch.nan]).double()]
    low, high, unknown = largest(fetch(*ends(tensors)))
    assert (low, high) == (2.0, 3.0)
    assert math.isnan(unknown)
