"""Activation grids as a checkpoint stores them: whatever their numbers, the same ones come back."""

from __future__ import annotations

import json
import math

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize

from lrpq.activations.calibrate import BlockGrids
from lrpq.activations.folding import folding_of
from lrpq.activations.grids import LogarithmicGrid, UniformGrid, between, quantized
from lrpq.checkpoint.activations import (
    grid_document,
    grid_from,
    grid_of,
    input_arguments,
    input_values,
    stored_activations,
    zero_point,
)
from lrpq.errors import CheckpointError
from lrpq.model.layers import LinearSpec

CASES = range(300)


def ranges(seed: int, channels: tuple[int, ...] = ()) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Ends of many magnitudes, on either side of zero or both, and a width."""
    g = torch.Generator().manual_seed(seed)
    size = 10 ** (8 * torch.rand((), generator=g) - 5)
    ends = torch.randn((2, *channels), generator=g) * size
    return ends.amin(0), ends.amax(0), 2 + seed % 7


@pytest.mark.parametrize("folded", [False, True])
def test_a_grid_with_zero_has_a_zero_point_and_comes_back_to_the_bit(folded: bool) -> None:
    for seed in CASES:
        low, high, bits = ranges(seed, (16,) if folded else ())
        grid = folding_of(between(low, high, bits)).grid if folded else between(low, high, bits)
        z = zero_point(grid)
        assert z is not None
        assert -(2 ** (bits - 1)) <= z < 2 ** (bits - 1)
        again = grid_of(input_values("m", grid)["m.input_scale"], z, bits)
        assert torch.equal(again.scale, grid.scale)
        assert torch.equal(again.offset, grid.offset)
        assert float(grid.values(torch.tensor(float(z + 2 ** (bits - 1))))) == pytest.approx(
            0, abs=float(grid.scale) / 1e4
        )


def test_other_offsets_have_none() -> None:
    for seed in CASES:
        low, high, bits = ranges(seed)
        grid = between(low, high, bits, exact_zero=False)
        z = zero_point(grid)
        if z is not None:  # an offset that happens to be whole steps
            assert torch.equal(grid_of(grid.scale, z, bits).offset, grid.offset)
    shifted = UniformGrid(bits=4, scale=torch.tensor(0.1), offset=torch.tensor(-0.17))
    above = UniformGrid(bits=4, scale=torch.tensor(0.5), offset=torch.tensor(1.0))
    below = UniformGrid(bits=4, scale=torch.tensor(0.5), offset=torch.tensor(-8.0))
    assert [zero_point(grid) for grid in (shifted, above, below)] == [None, None, None]


def test_compressed_tensors_computes_the_same_values() -> None:
    """Its own function, on our tensors; values half way between two codes aside."""
    for seed in CASES:
        low, high, bits = ranges(seed)
        grid = between(low, high, bits)
        values = input_values("m", grid)
        x = torch.linspace(float(low) - 1, float(high) + 1, 501) * 1.1
        x = x[((x - grid.offset) / grid.scale % 1 - 0.5).abs() > 1e-2]
        theirs = fake_quantize(
            x, values["m.input_scale"], values["m.input_zero_point"], QuantizationArgs(**input_arguments(bits))
        )
        torch.testing.assert_close(theirs, quantized(x, grid), rtol=1e-5, atol=float(grid.scale) * 1e-3)


def test_documents_hold_every_number_exactly() -> None:
    for seed in CASES:
        low, high, bits = ranges(seed)
        grid = between(low, high, bits, exact_zero=seed % 2 == 0)
        again = grid_from(json.loads(json.dumps(grid_document(grid))), "here")
        assert isinstance(again, UniformGrid)
        assert again.bits == bits
        assert torch.equal(again.scale, grid.scale)
        assert torch.equal(again.offset, grid.offset)
        pattern = LogarithmicGrid(bits=bits, scale=float(high.abs()), steps_per_octave=1 + seed % 2)
        assert grid_from(json.loads(json.dumps(grid_document(pattern))), "here") == pattern


def test_every_grid_is_stored_once() -> None:
    def spec(name: str, site: str) -> LinearSpec:
        return LinearSpec(name=name, block=0, d_out=4, d_in=4, input_site=site, fused_group=site)

    specs = [spec("q", "qkv"), spec("k", "qkv"), spec("o", "o"), spec("fc2", "down")]
    whole = between(torch.tensor(-1.0), torch.tensor(2.0), 4)
    shifted = UniformGrid(bits=4, scale=torch.tensor(0.1), offset=torch.tensor(-0.17))
    grids: list[BlockGrids] = [{"qkv": whole, "o": whole, "down": shifted, "key": whole}]
    found = stored_activations(specs, grids, packed={"q": 1, "k": 1, "fc2": 1})
    assert set(found.inputs) == {"q", "k"}
    assert [set(places) for places in found.table] == [{"o", "down", "key"}]  # o's weights are dense
    found = stored_activations(specs, grids, packed={"q": 1, "o": 1})  # a site's grid is not cut in two
    assert set(found.inputs) == {"o"}
    assert [set(places) for places in found.table] == [{"qkv", "down", "key"}]


@pytest.mark.parametrize("number", [0.0, -1.0, math.inf, math.nan])
def test_steps_that_are_none_are_refused(number: float) -> None:
    bad = UniformGrid(bits=4, scale=torch.tensor(number), offset=torch.tensor(0.0))
    with pytest.raises(CheckpointError, match="block 0, key: its numbers are"):
        stored_activations([], [{"key": bad}], packed={})
    with pytest.raises(CheckpointError, match="here"):
        grid_from({"type": "uniform", "bits": 4, "scale": number, "offset": 0}, "here")
