"""Activation grids against brute force, folding in float64, and integer arithmetic against whole numbers."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_images import images, write_classifier
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from lrpq.activations.allocate import allocate_widths
from lrpq.activations.apply import quantized_block
from lrpq.activations.attention import KEY, PATTERN, POINTS, QUERY, VALUE
from lrpq.activations.calibrate import Calibration, Candidate, Means, Place, calibrate
from lrpq.activations.clipping import (
    SHARES,
    best,
    channel_candidates,
    pattern_candidates,
    squared_error,
    tensor_candidates,
)
from lrpq.activations.folding import fold_plan, folding_of
from lrpq.activations.grids import LogarithmicGrid, UniformGrid, between, quantized
from lrpq.activations.integer import integer_linear
from lrpq.activations.judging import AttentionError, site_error
from lrpq.errors import ModelError, QuantizationError
from lrpq.evaluate.classification import class_logits, score_images
from lrpq.model.layers import Choice
from lrpq.model.source import open_source
from lrpq.model.streaming import BlockStream
from lrpq.quant.grid import QuantizedWeight
from lrpq.quant.rtn import round_to_nearest
from lrpq.transform.writing import write_folded

seeds = st.integers(0, 2**31 - 1)
widths = st.integers(2, 8)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def error_of(x: Tensor, grid: Any) -> float:
    return squared_error(x)(grid)


def search_tensor(x: Tensor, bits: int, **options: Any) -> UniformGrid:
    return best(tensor_candidates(x, bits, **options), squared_error(x))


def search_channels(x: Tensor, bits: int, **options: Any) -> UniformGrid:
    return best(channel_candidates(x, bits, **options), squared_error(x))


def search_pattern(p: Tensor, bits: int) -> Any:
    return best(pattern_candidates(p, bits), squared_error(p))


def outliers(tokens: int, channels: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Channels of very different ranges and centres, as behind LayerNorm, and a few values far out."""
    x = noise(tokens, channels, seed=seed, dtype=dtype) * torch.logspace(-2, 1, channels, dtype=dtype)
    x = x + noise(channels, seed=seed + 1, dtype=dtype)
    x[::17] *= 6
    return x


def all_values(grid: Any) -> Tensor:
    values: Tensor = grid.values(torch.arange(2.0**grid.bits, dtype=torch.float64))
    return values


@given(seed=seeds, bits=widths, low=st.floats(-5, 0.5), width=st.floats(0.01, 9), exact_zero=st.booleans())
@settings(max_examples=40, deadline=None)
def test_uniform_codes_are_the_nearest_of_all_values(
    seed: int, bits: int, low: float, width: float, exact_zero: bool
) -> None:
    ends = torch.tensor([low, low + width], dtype=torch.float64)
    grid = between(ends[0], ends[1], bits, exact_zero=exact_zero)
    x = noise(64, seed=seed, dtype=torch.float64) * 4
    distances = (x[:, None] - all_values(grid)).abs()
    torch.testing.assert_close((quantized(x, grid) - x).abs(), distances.amin(1))
    assert bool(all_values(grid).abs().amin() < 1e-9) or not exact_zero
    if not exact_zero:
        assert float(grid.values(torch.zeros(()))) == pytest.approx(low)
        assert float(all_values(grid).amax()) == pytest.approx(low + width)


@given(seed=seeds, bits=widths, steps=st.sampled_from([1, 2]))
@settings(max_examples=20, deadline=None)
def test_logarithmic_codes_are_the_nearest_exponents(seed: int, bits: int, steps: int) -> None:
    p = torch.softmax(6 * noise(16, 12, seed=seed, dtype=torch.float64), -1)
    grid = LogarithmicGrid(bits=bits, scale=float(p.amax()), steps_per_octave=steps)
    exponents = torch.arange(2**bits - 1, dtype=torch.float64) / steps
    found = quantized(p, grid)
    smallest = grid.scale * 2.0 ** float(-exponents[-1])
    kept = p > smallest * 2.0 ** (-0.49 / steps)
    nearest = (-(p / grid.scale).log2()[..., None] - exponents).abs().argmin(-1)
    torch.testing.assert_close(found[kept], (grid.scale * 2.0 ** -exponents[nearest])[kept])
    assert bool((found[p < smallest * 2.0 ** (-0.51 / steps)] == 0).all())
    assert float(quantized(torch.zeros(1), grid)) == 0.0


def test_the_pattern_is_logarithmic_where_codes_are_few() -> None:
    p = torch.softmax(noise(400, 65), -1)
    assert isinstance(search_pattern(p, 4), LogarithmicGrid)
    assert isinstance(search_pattern(p, 8), UniformGrid)
    for bits in (2, 3, 4, 8):
        found = error_of(p, search_pattern(p, bits))
        others = [LogarithmicGrid(bits=bits, scale=float(p.amax()), steps_per_octave=m) for m in (1, 2)]
        assert found <= min(error_of(p, grid) for grid in (*others, search_tensor(p, bits)))


@given(seed=seeds, bits=widths)
@settings(max_examples=15, deadline=None)
def test_searched_ranges_are_the_best_of_all_candidates(seed: int, bits: int) -> None:
    """Brute force: every share by itself, for each channel and for the tensor."""
    x = outliers(203, 5, seed)
    best = search_channels(x, bits)
    errors = (quantized(x, best) - x).double().square().mean(0)
    for c in range(x.shape[1]):
        alone = [error_of(x[:, c], _between_quantiles(x[:, c], share, bits)) for share in SHARES]
        assert float(errors[c]) == pytest.approx(min(alone), rel=1e-6)
    whole = min(error_of(x, _between_quantiles(x.flatten(), share, bits)) for share in SHARES)
    assert error_of(x, search_tensor(x, bits)) == pytest.approx(whole, rel=1e-6)


def _between_quantiles(x: Tensor, share: float, bits: int) -> UniformGrid:
    ordered = x.sort().values
    top = round(share * (len(x) - 1))
    return between(ordered[len(x) - 1 - top], ordered[top], bits)


def test_clipping_and_channels_lower_the_error_behind_a_layer_norm() -> None:
    x = outliers(1000, 32, 3)
    whole, clipped = search_tensor(x, 4, shares=(1.0,)), search_tensor(x, 4)
    channels, both = search_channels(x, 4, shares=(1.0,)), search_channels(x, 4)
    errors = [error_of(x, grid) for grid in (whole, clipped, channels, both)]
    assert errors[0] > errors[1]
    assert errors[2] > errors[3]
    assert errors[1] > 2 * errors[3]


def test_output_error_is_that_of_the_next_layers() -> None:
    """Brute force over all candidates. Where one token alone is far out and alone matters, nothing is clipped."""
    x, W = noise(500, 16), noise(5, 16, seed=1)
    x[7] *= 10
    s = torch.zeros(500).index_fill_(0, torch.tensor([7]), 1.0)
    for weights in (None, s):
        error, t = site_error(x, W, weights), torch.ones(500) if weights is None else weights
        grids = list(channel_candidates(x, 3))
        by_hand = [((quantized(x, g) @ W.T - x @ W.T).square().sum(1) * t).mean() / 2 for g in grids]
        chosen = best(channel_candidates(x, 3), error)
        assert error(chosen) == pytest.approx(float(min(by_hand)), rel=1e-4)
        assert torch.equal(chosen.scale, grids[0].scale) == (weights is not None)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("point", POINTS)
def test_attention_error_is_that_of_what_reads_its_output(point: str, masked: bool) -> None:
    W, s = noise(5, 8, seed=9), torch.rand(3 * 9, generator=torch.Generator().manual_seed(8))
    tensors = {name: 2 * noise(3, 2, 9, 4, seed=seed) for seed, name in enumerate((QUERY, KEY, VALUE))}
    mask = 3 * noise(3, 2, 9, 9, seed=7) if masked else None

    def run(q: Tensor, k: Tensor, v: Tensor, p: Any = None) -> tuple[Tensor, Tensor]:
        scores = q @ k.transpose(-1, -2) * 0.3
        pattern = torch.softmax(scores if mask is None else scores + mask, -1) if p is None else p
        return pattern @ v, pattern

    output, pattern = run(*tensors.values())
    error = AttentionError(*tensors.values(), pattern, scaling=0.3, W=W, s=s, mask=mask).of(point)
    x = {**tensors, PATTERN: pattern}[point]
    grid = search_tensor(x, 3)
    changed = {**tensors, **({} if point == PATTERN else {point: quantized(x, grid)})}
    found, _ = run(*changed.values(), quantized(x, grid) if point == PATTERN else None)
    dy = torch.einsum("nhtd,ohd->nto", found - output, W.view(5, 2, 4)).flatten(0, 1)
    assert error(grid) == pytest.approx(float((s[:, None] * dy.square()).sum() / 2 / len(s)), rel=1e-4)


def test_shifted_grid_begins_at_the_bound_of_gelu() -> None:
    x = nn.functional.gelu(0.5 * noise(4000))
    low = float(x.amin())
    shifted, plain = search_tensor(x, 4, low=low), search_tensor(x, 4)
    assert float(shifted.offset) == pytest.approx(low)
    assert error_of(x, shifted) < 0.95 * error_of(x, plain)
    wide = nn.functional.gelu(8 * noise(4000))  # a step is wider than all that is negative: zero is worth more
    assert float(search_tensor(wide, 4, low=low).offset) == 0.0


@given(seed=seeds, bits=widths)
@settings(max_examples=15, deadline=None)
def test_folding_is_exact_before_quantization_and_keeps_the_codes(seed: int, bits: int) -> None:
    """float64: W LN(x) + b is what it was, and the tensor's codes are the channels' codes."""
    h, d_out = 12, 7
    norm = nn.LayerNorm(h, dtype=torch.float64)
    gain, beta = noise(h, seed=seed, dtype=torch.float64), noise(h, seed=seed + 1, dtype=torch.float64)
    norm.load_state_dict({"weight": gain * 2, "bias": beta})
    W, b = noise(d_out, h, seed=seed + 2, dtype=torch.float64), noise(d_out, seed=seed + 3, dtype=torch.float64)
    x = outliers(90, h, seed + 4, torch.float64)
    y = norm(x).detach()
    channels = search_channels(y.float(), bits)
    folding = folding_of(channels)
    new_gain, new_beta = folding.of_norm(norm.weight.detach(), norm.bias.detach())
    new_W, new_b = folding.of_layer(W, b)
    normed = nn.functional.layer_norm(x, (h,), new_gain, new_beta, norm.eps)
    torch.testing.assert_close(normed @ new_W.T + new_b, y @ W.T + b, rtol=1e-9, atol=1e-9)
    wide = UniformGrid(bits=bits, scale=channels.scale.double(), offset=channels.offset.double())
    one = UniformGrid(bits=bits, scale=folding.grid.scale.double(), offset=folding.grid.offset.double())
    assert not one.per_channel
    halfway = ((y - wide.offset) / wide.scale).frac().abs().sub(0.5).abs() < 1e-6
    assert torch.equal(one.codes(normed)[~halfway], wide.codes(y)[~halfway])
    values = quantized(normed, one) @ new_W.T + new_b
    torch.testing.assert_close(values[~halfway.any(1)], (quantized(y, wide) @ W.T + b)[~halfway.any(1)])


@given(seed=seeds, weight_bits=widths, bits=widths, d_in=st.sampled_from([3, 64, 1100]))
@settings(max_examples=25, deadline=None)
def test_integer_linear_is_that_of_whole_numbers_bit_for_bit(seed: int, weight_bits: int, bits: int, d_in: int) -> None:
    """Against int64: the worst case of eight bits and 1,100 inputs leaves what float32 counts exactly."""
    W, x, bias = noise(9, d_in, seed=seed), 3 * noise(33, d_in, seed=seed + 1), noise(9, seed=seed + 2)
    weight = round_to_nearest(W, Choice(bits=weight_bits, group_size=-1))
    grid = search_tensor(x, bits)
    layer = integer_linear(weight, bias, grid, name="layer")
    q = grid.codes(x).to(torch.int64)
    reference = q @ weight.codes.to(torch.int64).T
    assert torch.equal(layer.accumulated(grid.codes(x)).to(torch.int64), reference)
    assert torch.equal(layer(x), layer.rescaled(reference))
    simulated = grid.values(grid.codes(x).double()) @ weight.dequantize(torch.float32).double().T + bias.double()
    torch.testing.assert_close(layer(x).double(), simulated, rtol=1e-4, atol=1e-4)


def test_extreme_codes_stay_exact() -> None:
    """An odd sum above 2^24, which float32 does not hold."""
    codes = torch.full((1, 769), -127, dtype=torch.int8)
    weight = QuantizedWeight(codes=codes, scales=torch.ones(1, 1).bfloat16(), choice=Choice(bits=8, group_size=-1))
    grid = UniformGrid(bits=8, scale=torch.tensor(1.0), offset=torch.tensor(0.0))
    layer = integer_linear(weight, None, grid, name="layer")
    found = layer.accumulated(grid.codes(torch.full((1, 769), 255.0)))
    assert int(found) == -127 * 255 * 769
    assert int(found.float()) != -127 * 255 * 769


def test_integer_arithmetic_refuses_what_it_cannot_multiply() -> None:
    grid = between(torch.tensor(0.0), torch.tensor(1.0), 8)
    with pytest.raises(QuantizationError, match=r"layer: .*one scale a row.*group size -1"):
        integer_linear(round_to_nearest(noise(4, 64), Choice(bits=4, group_size=32)), None, grid, name="layer")
    weight = round_to_nearest(noise(4, 64), Choice(bits=4, group_size=-1))
    with pytest.raises(QuantizationError, match=r"layer: .*step a channel"):
        integer_linear(weight, None, search_channels(noise(50, 64), 8), name="layer")
    with pytest.raises(QuantizationError, match="1 bits: expected 2 to 8"):
        between(torch.tensor(0.0), torch.tensor(1.0), 1)


SITES = {
    "vit": [("qkv", "up")] * 2,
    "deit": [("qkv", "up")] * 2,
    "dinov2": [("qkv", "up")] * 2,
    "vit-wide-patches": [("qkv", "up")] * 2,
    "swin": [("qkv", "up"), ("qkv", "up"), ("merge",), ("qkv", "up"), ("qkv", "up")],
    "swin-padded": [("qkv", "up"), ("qkv", "up"), ("merge",), ("qkv", "up"), ("qkv", "up")],
}


@pytest.mark.parametrize("name", SITES)
def test_folded_model_is_the_same_function(name: str, tmp_path: Path) -> None:
    """Also where layers have no bias (vit-wide-patches, merging of patches) or windows are padded (swin-padded)."""
    stream = BlockStream(open_source(write_classifier(tmp_path / "model", name)), dtype=torch.float32)
    x = images(6, name)
    found = calibrate(stream, x, widths=[8])
    eight = found.uniform(8)
    folded = found.foldings(eight)
    assert set(folded) == {(block, site) for block, sites in enumerate(SITES[name]) for site in sites}
    ratio = [folding.ratio.max() / folding.ratio.min() for folding in folded.values()]
    assert min(ratio) > 1.2  # every site is really folded
    assert all(not g.per_channel for grids in found.grids(eight) for g in grids.values() if isinstance(g, UniformGrid))
    write_folded(stream.source, tmp_path / "folded", fold_plan(stream, found.foldings(eight)), dtype=torch.float32)
    models = [AutoModelForImageClassification.from_pretrained(tmp_path / f) for f in ("model", "folded")]
    with torch.no_grad():
        before, after = (model.double()(pixel_values=x.double()).logits for model in models)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert not torch.equal(after, before)


def test_widths_are_the_best_within_the_average() -> None:
    """Brute force over all plans of a few places."""
    generator = torch.Generator().manual_seed(4)
    places = {}
    for i in range(5):
        sizes, costs = torch.randint(1, 40, (1,), generator=generator), torch.rand(1, generator=generator)
        found = {b: Candidate(grid=_GRID, folding=None, cost=float(costs) * 4.0**-b) for b in (3, 4, 5)}
        places[i, "o"] = Place(num_values=int(sizes), candidates=found)
    widths = allocate_widths(Calibration(places=places), average_bits=4)

    def cost(plan: tuple[int, ...]) -> float:
        return sum(place.candidates[b].cost for place, b in zip(places.values(), plan, strict=True))

    total = sum(place.num_values for place in places.values())
    plans = [
        plan
        for plan in itertools.product((3, 4, 5), repeat=5)
        if sum(b * place.num_values for place, b in zip(places.values(), plan, strict=True)) <= 4 * total
    ]
    chosen = tuple(widths[key] for key in places)
    assert chosen in plans
    assert cost(chosen) == pytest.approx(min(map(cost, plans)), rel=1e-5)


_GRID = UniformGrid(bits=4, scale=torch.tensor(1.0), offset=torch.tensor(0.0))


def test_without_bias_nothing_takes_the_shift(tmp_path: Path) -> None:
    stream = BlockStream(open_source(write_classifier(tmp_path / "model", "vit-wide-patches")), dtype=torch.float32)
    shifting = folding_of(search_channels(outliers(90, 32, 3), 8))
    with pytest.raises(ModelError, match=r"q_proj: has no bias"):
        fold_plan(stream, {(0, "qkv"): shifting})


def test_a_block_computes_what_its_grids_say(tmp_path: Path) -> None:
    """Against the block's formula written out: LayerNorm, attention, GELU, every product of quantized factors."""
    stream = BlockStream(open_source(write_classifier(tmp_path / "model", "vit")), dtype=torch.float32)
    x = images(4)
    calibration = calibrate(stream, x, widths=[5], means=Means.ALL & ~Means.CHANNELS)
    grids = calibration.grids(calibration.uniform(5))[0]
    hidden = stream.embed(x)
    with stream.block(0) as block, torch.no_grad():
        codes = {
            spec.name: round_to_nearest(stream.weight(spec), Choice(bits=4, group_size=-1))
            for spec in stream.block_specs(0)
        }
        with quantized_block(stream, 0, block, grids, codes):
            found = stream.run(block, 0, hidden)
        parts: Any = block

        def linear(path: str, site: str, z: Tensor) -> Tensor:
            W = codes[f"vit.layers.0.{path}"].dequantize(torch.float32)
            return quantized(z, grids[site]) @ W.T + parts.get_submodule(path).bias

        def heads(z: Tensor) -> Tensor:
            return z.unflatten(-1, (4, 8)).transpose(1, 2)

        z = parts.layernorm_before(hidden)
        q, k, v = (
            quantized(heads(linear(f"attention.{n[0]}_proj", "qkv", z)), grids[n]) for n in ("query", "key", "value")
        )
        p = quantized(torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, -1), grids["pattern"])
        middle = hidden + linear("attention.o_proj", "o", (p @ v).transpose(1, 2).flatten(2))
        up = nn.functional.gelu(linear("mlp.fc1", "up", parts.layernorm_after(middle)))
        expected = middle + linear("mlp.fc2", "down", up)
        close = ((found - expected).abs() < 1e-3).float().mean()  # a value halfway between two codes may go either way
        assert float(close) > 0.98
        assert not torch.allclose(stream.run(block, 0, hidden), found, atol=1e-2)


def test_more_bits_are_nearer_to_the_original(tmp_path: Path) -> None:
    stream = BlockStream(open_source(write_classifier(tmp_path / "model", "vit")), dtype=torch.float32)
    x, labels = images(16), torch.arange(16) % 10

    def kl(bits: int, means: Means = Means.ALL & ~Means.CHANNELS) -> float:
        found = calibrate(stream, x, widths=[bits], means=means)
        grids = found.grids(found.uniform(bits))
        scores = score_images(
            stream, x, labels, {"a": (stream, lambda i, block: quantized_block(stream, i, block, grids[i], {}))}
        )
        assert float(scores["reference"].kl_nats.abs().max()) == 0.0
        return float(scores["a"].kl_nats.mean())

    found = [kl(bits) for bits in (3, 4, 6, 8)]
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.01 * found[0]


@torch.no_grad()
def test_logits_are_the_models_own(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "model", "deit")
    stream, x = BlockStream(open_source(folder), dtype=torch.float32), images(5)
    own = AutoModelForImageClassification.from_pretrained(folder)(pixel_values=x).logits
    torch.testing.assert_close(class_logits(stream, x, None, micro_batch=2), own)
    scores = score_images(stream, x, own.argmax(-1), {})
    assert scores["reference"].top1 == 1.0
