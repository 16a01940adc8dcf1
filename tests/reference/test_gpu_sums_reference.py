"""Sums that a GPU makes of bfloat16 activations, against float64; and the copies that it makes meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import write_llama

import lrpq.relevance.outputs
from lrpq.model.kept import KeptInputs
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.streaming import BlockStream
from lrpq.quant.activation_sums import add_sum, channel_squares, split, token_squares
from lrpq.quant.hessian import accumulate, empty_hessian, mirror
from lrpq.relevance.outputs import add_outputs, empty_outputs

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def test_two_parts_hold_seventeen_bits() -> None:
    wide = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 20, 10_000)
    high, low = split(wide)
    assert high.dtype == low.dtype == torch.bfloat16
    error = (high.double() + low.double() - wide.double()).abs() / wide.double().abs()
    assert error.max() <= 2.0**-17
    assert ((high.double() - wide.double()).abs() / wide.double().abs()).max() > 2.0**-10  # one part would not do


def test_a_product_is_added() -> None:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(300, 7, generator=generator)
    exact = torch.randn(300, 5, generator=generator).bfloat16()
    total = add_sum(torch.ones(7, 5), wide, exact)
    torch.testing.assert_close(total.double(), 1 + wide.double().T @ exact.double(), rtol=1e-5, atol=1e-4)


def test_squares_are_those_of_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    g = (torch.randn(400, 33, generator=generator) * torch.logspace(-12, 12, 33)).bfloat16()
    squares = g.double().square()
    torch.testing.assert_close(token_squares(g).double(), squares.sum(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(channel_squares(g), squares.sum(0), rtol=1e-12, atol=0)
    assert token_squares(g).dtype == torch.float32
    broken = g.clone()
    broken[3, 2] = torch.inf
    assert not torch.isfinite(token_squares(broken)[3])


@pytest.mark.parametrize("rows", [4, 7, 20, 64])
def test_moments_by_blocks_are_the_whole_square(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lrpq.relevance.outputs, "MIN_GPU_ROWS", rows)
    generator = torch.Generator().manual_seed(0)
    G, wanted = torch.zeros(20, 20), torch.zeros(20, 20, dtype=torch.float64)
    for _ in range(2):
        g = torch.randn(50, 20, generator=generator).bfloat16()
        inverse = torch.rand(50, 1, generator=generator)
        lrpq.relevance.outputs._add_split(G, g, inverse)
        wanted += (g.double() * inverse.double()).T @ g.double()
    torch.testing.assert_close(G.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("d", [64, 576, 5000])
def test_sums_of_bfloat16_in_two_parts_are_near_fp32(d: int) -> None:
    """Far nearer than in one part, and far below what damping adds to a diagonal."""
    generator = torch.Generator("cuda").manual_seed(d)
    X = torch.randn(4096, d, device="cuda", generator=generator).bfloat16()
    s = torch.rand(4096, device="cuda", generator=generator)
    wanted = (X.double() * s.double()[:, None]).T @ X.double()
    scale = wanted.diagonal().mean()
    found = mirror(accumulate(empty_hessian(d, "cuda"), X, s)).xx
    one_part = torch.mm((X.float() * s[:, None]).bfloat16().T, X, out_dtype=torch.float32)
    error, of_one = ((sums.double() - wanted).square().mean().sqrt() / scale for sums in (found, one_part))
    assert error < 1e-6
    assert error < 0.1 * of_one
    rounded = add_sum(torch.zeros(d, d, device="cuda"), X.float() * s[:, None], X, rounded=True)
    assert torch.equal(rounded, one_part)
    assert of_one < 1e-4
    outputs = empty_outputs(d, "cuda")
    add_outputs(outputs, X)
    x = X.double()[:, : len(outputs[0])]
    G = (x / X.double().norm(dim=1, keepdim=True)).T @ x
    assert (outputs[0].double() - G).square().mean().sqrt() < 1e-6 * G.diagonal().mean()
    torch.testing.assert_close(token_squares(X).double(), X.double().square().sum(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(channel_squares(X), X.double().square().sum(0), rtol=1e-12, atol=0)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("memory_bytes", [0, 10 << 20, 1 << 30])
def test_copies_hold_what_was_put(memory_bytes: int) -> None:
    with KeptInputs(memory_bytes=memory_bytes) as kept:
        for key in range(40):
            x = torch.full((512, 512), float(key), device="cuda")
            kept.put((key,), x * 2)
            x.fill_(-1)
        for key in reversed(range(40)):
            taken = kept.take((key,))
            assert taken.is_cuda
            assert bool((taken == 2 * key).all())
        assert kept.held_bytes == 0


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("memory_bytes", [0, 1 << 33])
@pytest.mark.parametrize("expected", [True, False])
def test_copies_keep_up_with_a_stream_that_goes_on(expected: bool, memory_bytes: int) -> None:
    """Tensors larger than a buffer, while the device computes on what they were and on what came back."""
    generator = torch.Generator("cuda").manual_seed(0)
    first = torch.randn(4, 2048, 4096, device="cuda", generator=generator).bfloat16()
    W = torch.randn(4096, 4096, device="cuda", generator=generator).bfloat16() / 64
    hidden, sums = first, []
    with KeptInputs(memory_bytes=memory_bytes) as kept:
        for key in range(12):
            kept.put((key,), hidden)
            sums.append(hidden.double().sum())
            hidden = hidden @ W
        if expected:
            kept.expect((key,) for key in reversed(range(12)))
        for key in reversed(range(12)):
            taken = kept.take((key,))
            assert torch.equal(taken.double().sum(), sums[key])
            product = taken @ W  # memory of earlier ones is used again by later ones
            assert torch.equal(product, hidden)
            hidden = taken
        assert torch.equal(hidden, first)


@pytest.mark.gpu
@needs_gpu
def test_streamed_weights_are_those_on_disk(tmp_path: Path) -> None:
    source = ModelSource(write_llama(tmp_path / "llama", layers=5))
    for dtype in (torch.float32, torch.bfloat16):
        stream = BlockStream(source, dtype=dtype, device="cuda")
        order = [4, 0, 2, 1]
        for index, block in stream.stream(order):
            W = {name: p for name, p in block.state_dict().items() if name.endswith("proj.weight")}
            assert len(W) == 7
            for name, p in W.items():
                assert p.is_cuda
                assert torch.equal(p.cpu(), source.read(f"model.layers.{index}.{name}").to(dtype))
            if index == 2:
                break  # one is on its way then
