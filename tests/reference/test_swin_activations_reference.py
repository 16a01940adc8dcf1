"""Activation grids of Swin: zero with one code where folding may not shift, and costs across stages."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_images import images, write_classifier
from torch import Tensor

from lrpq.activations.attention import with_points
from lrpq.activations.calibrate import Means, attention_of, calibrate, recorded
from lrpq.activations.clipping import channel_candidates
from lrpq.activations.folding import folding_of
from lrpq.activations.grids import around_zero, quantized
from lrpq.model.source import open_source
from lrpq.model.streaming import BlockStream

seeds = st.integers(0, 2**31 - 1)
widths = st.integers(2, 8)


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(seed=seeds, bits=widths)
@settings(max_examples=15, deadline=None)
def test_one_code_for_zero_in_all_channels_is_folded_without_a_shift(seed: int, bits: int) -> None:
    """The grids hold their ranges and no narrower ones with this zero do; folded, zero stays zero and no bias moves."""
    x = noise(90, 12, seed=seed) * torch.logspace(-2, 1, 12) + noise(12, seed=seed + 4)
    low, high = x.amin(0), x.amax(0)
    channels = around_zero(low, high, bits)
    zero = 2.0 ** (bits - 1)
    assert torch.equal(channels.codes(torch.zeros(1, 12)), torch.full((1, 12), zero))
    ends = [channels.values(torch.tensor(code)) for code in (0.0, 2.0**bits - 1)]
    slack = 1e-5 * channels.scale
    assert bool(((ends[0] <= low + slack) & (ends[1] >= high - slack)).all())
    assert bool(torch.isclose(low, ends[0], rtol=1e-4).logical_or(torch.isclose(high, ends[1], rtol=1e-4)).all())
    searched = list(channel_candidates(x, bits, shared_zero=True))[-1]
    folding = folding_of(searched, shared_zero=True)
    W, gain, beta = noise(5, 12, seed=seed + 1), noise(12, seed=seed + 2), noise(12, seed=seed + 3)
    assert not folding.of_bias(W).any()
    new_gain, new_beta = folding.of_norm(gain, beta)
    torch.testing.assert_close(new_gain * folding.ratio, gain.double())
    torch.testing.assert_close(new_beta * folding.ratio, beta.double(), rtol=1e-9, atol=1e-9)
    assert int(folding.grid.codes(torch.zeros(()))) == zero
    codes = folding.grid.codes((x.double() / folding.ratio).float())
    assert float((codes != searched.codes(x)).float().mean()) < 0.01  # halfway between two


def test_costs_are_means_over_the_first_blocks_tokens(tmp_path: Path) -> None:
    """By hand for sites of a merged stage, which has a quarter of the tokens, and for a merging itself."""
    stream, x = (
        BlockStream(open_source(write_classifier(tmp_path / "m", "swin")), dtype=torch.float32),
        images(6, "swin"),
    )
    rows = {(0, "up"): 6 * 64, (2, "merge"): 6 * 16, (3, "up"): 6 * 16, (3, "o"): 6 * 16}
    weights = {
        block: {site: torch.rand(count, generator=torch.Generator().manual_seed(block + count))}
        for (block, site), count in rows.items()
        if site != "o"
    }
    found = calibrate(stream, x, widths=[4], means=Means.ALL & ~Means.CHANNELS, token_weights=weights)
    seen: dict[tuple[int, str], Tensor] = {}
    hidden = stream.embed(x)
    for index, block in stream.stream(range(stream.num_blocks)):
        with torch.no_grad(), recorded(stream, index, block) as parts:
            hidden = stream.run(block, index, hidden)
        seen |= {(index, place): torch.cat(values) for place, values in parts.items()}
    for (index, site), count in rows.items():
        grid, X = found.places[index, site].candidates[4].grid, seen[index, site]
        assert len(X) == count
        W = torch.cat([stream.weight(spec) for spec in stream.sites(index)[site]])
        s = weights[index].get(site, torch.ones(count)) if site != "o" else torch.ones(count)
        error = (s * ((quantized(X, grid) - X) @ W.T).square().sum(1)).sum() / 2
        assert found.places[index, site].candidates[4].cost == pytest.approx(float(error) / (6 * 64), rel=1e-3)
    assert [found.places[key].num_values for key in ((0, "up"), (2, "merge"), (3, "pattern"))] == [1024, 1024, 4 * 256]


@pytest.mark.parametrize("name", ["swin", "swin-padded"])
@torch.no_grad()
def test_points_alone_change_nothing(name: str, tmp_path: Path) -> None:
    """Of windows, shifted ones and merging: the plain computation is the kernel's, bias and mask included."""
    stream = BlockStream(open_source(write_classifier(tmp_path / "m", name)), dtype=torch.float64)
    hidden = stream.embed(images(3, name))
    for index, block in stream.stream(range(stream.num_blocks)):
        plain = stream.run(block, index, hidden)
        with with_points(attention_of(stream, block), {}):
            torch.testing.assert_close(stream.run(block, index, hidden), plain)
        assert torch.equal(stream.run(block, index, hidden), plain)
        assert (attention_of(stream, block) is None) == (index == 2)
        hidden = plain


@torch.no_grad()
def test_points_are_judged_with_the_bias_and_mask_of_their_scores(tmp_path: Path) -> None:
    """The cost of a shifted block's queries and keys is what the output projection shows when they are rounded."""
    stream, x = (
        BlockStream(open_source(write_classifier(tmp_path / "m", "swin")), dtype=torch.float32),
        images(5, "swin"),
    )
    found = calibrate(stream, x, widths=[3], means=Means.ALL & ~Means.CHANNELS)
    hidden = stream.embed(x)
    with stream.block(0) as block:
        hidden = stream.run(block, 0, hidden)
    with stream.block(1) as block:
        outputs: list[Tensor] = []
        block.get_submodule("attention.o_proj").register_forward_hook(lambda _, __, y: outputs.append(y.double()))
        stream.run(block, 1, hidden)
        for point in ("query", "key"):
            candidate = found.places[1, point].candidates[3]
            with with_points(attention_of(stream, block), {point: partial(quantized, grid=candidate.grid)}):
                stream.run(block, 1, hidden)
            error = float((outputs[-1] - outputs[0]).square().sum()) / 2 / (5 * 64)
            assert candidate.cost == pytest.approx(error, rel=1e-3)
