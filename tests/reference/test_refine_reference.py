"""The refinement sweep against two plain models: the original, and one whose earlier layers are replaced."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_llama
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lrpq.model.layers import Choice, LinearSpec
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.streaming import BlockStream
from lrpq.quant.factor import factorize
from lrpq.quant.gptq import gptq
from lrpq.quant.grid import Grid
from lrpq.quant.hessian import normalized
from lrpq.refine.products import SiteProducts, merge_products
from lrpq.refine.quantize import quantize_refined
from lrpq.refine.sweep import RefineSweep
from lrpq.shards import root

WINDOWS, LENGTH, VOCABULARY, LAYERS = 5, 12, 128, 3
SHARDS = {0: range(3), 1: range(3, 5)}
MICRO_BATCH = 2
TOKENS = torch.randint(VOCABULARY, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(3))
WEIGHTS = torch.rand(WINDOWS * LENGTH, generator=torch.Generator().manual_seed(4)) ** 3 + 1e-3
CHOICE = Choice(bits=3, group_size=32)
GRID = Grid.SIGNED
POLISHED: dict[str, Any] = {"damping": 0.01, "correction_damping": 0.05, "grid": GRID, "name": "layer"}
HOW: dict[str, Any] = {**POLISHED, "polish_rounds": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("refine") / "llama", layers=LAYERS)


def sweep_of(folder: Path, *, with_shift: bool = True) -> RefineSweep:
    stream = BlockStream(ModelSource(folder), dtype=torch.float32)
    shards = {i: TOKENS[list(windows)] for i, windows in SHARDS.items()}
    sweep = RefineSweep(stream, shards, num_shards=2, micro_batch=MICRO_BATCH, with_shift=with_shift)
    sweep.embed()
    return sweep


def token_weights() -> dict[int, Tensor]:
    by_window = WEIGHTS.view(WINDOWS, LENGTH)
    return {i: by_window[list(windows)].flatten() for i, windows in SHARDS.items()}


def inputs_of(model: Any, name: str) -> Tensor:
    """Input of one layer on all windows, [tokens, d_in]."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        model(TOKENS, use_cache=False)
    handle.remove()
    return seen[0].flatten(0, 1).double()


ADDED = {"o": "input_layernorm", "down": "post_attention_layernorm"}
"""Site whose layer adds to the hidden states -> norm that reads these first."""


def added_to(model: Any, name: str) -> Tensor:
    """Hidden states that the output of a layer is added to, [tokens, h]."""
    prefix, _, _ = name.rpartition(".self_attn." if "self_attn" in name else ".mlp.")
    return inputs_of(model, f"{prefix}.{ADDED['o' if 'self_attn' in name else 'down']}")


def block_output(model: Any, block: int) -> Tensor:
    seen: list[Tensor] = []

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = model.model.layers[block].register_forward_hook(hook)
    with torch.no_grad():
        model(TOKENS, use_cache=False)
    handle.remove()
    return seen[0]


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def replacement(spec: LinearSpec, W: Tensor) -> Tensor:
    """Another weight, about as far from the original as three bits would put it."""
    noise = torch.randn(W.shape, generator=torch.Generator().manual_seed(spec.block * 10 + len(spec.name)))
    return 0.95 * W + 0.1 * W.abs().mean() * noise


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "plain"])
def test_products_and_streams_are_those_of_two_plain_models(folder: Path, weighted: bool) -> None:
    sweep, unshifted = sweep_of(folder), sweep_of(folder, with_shift=False)
    original: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    changed: Any = copy.deepcopy(original)
    s = (WEIGHTS if weighted else torch.ones_like(WEIGHTS)).double()
    for index, block in sweep.stream.stream(range(LAYERS)):
        quantized: dict[str, Tensor] = {}
        for site in sweep.stream.sites(index).values():
            weights = token_weights() if weighted else None
            products = root(sweep.products(index, block, site, weights, quantized), 2, merge_products)
            x, xq = inputs_of(original, site[0].name), inputs_of(changed, site[0].name)
            C, D = (xq * s[:, None]).T @ xq, ((x - xq) * s[:, None]).T @ xq
            assert distance(normalized(products.hessian) * products.hessian.weight_sum, C) < 1e-4, site[0].name
            assert products.hessian.weight_sum == pytest.approx(float(s.sum()), rel=1e-6)
            assert products.hessian.num_tokens == WINDOWS * LENGTH
            if site[0].input_site in ADDED:
                W = original.get_submodule(site[0].name).weight.detach().double()
                r, rq = (added_to(model, site[0].name) for model in (original, changed))
                P = (((x - xq) @ W.T + r - rq) * s[:, None]).T @ xq
                assert products.shift is None
                assert products.pull is not None
                assert distance(products.pull, P) < 1e-4, site[0].name
                if index or site[0].input_site == "down":  # the input of the first block has no error
                    assert distance(products.pull, W @ D) > 0.05
            else:
                assert products.pull is None
                assert products.shift is not None
                if index == 0 and site[0].input_site == "qkv":  # nothing is quantized before the very first site
                    assert not products.shift.any()
                else:
                    assert D.norm() > 1e-3 * C.norm()
                    assert distance(products.shift, D) < 1e-4, site[0].name
            alone = root(unshifted.products(index, block, site, weights, quantized), 2, merge_products)
            assert alone.shift is None
            assert alone.pull is None
            assert torch.equal(alone.hessian.xx, products.hessian.xx)
            for spec in site:
                linear = changed.get_submodule(spec.name)
                quantized[spec.name] = replacement(spec, linear.weight.detach())
                linear.weight.data = quantized[spec.name].clone()
        kept = {name: p.clone() for name, p in block.state_dict().items()}
        sweep.advance(index, block, quantized)
        unshifted.advance(index, block, quantized)
        for name, p in block.state_dict().items():
            assert torch.equal(p, kept[name])  # the block itself is left as it was
        for streams, model in ((sweep.original, original), (sweep.quantized, changed)):
            found = torch.cat([torch.cat(streams[shard]) for shard in SHARDS])
            assert distance(found, block_output(model, index)) < 1e-5
        assert all(
            torch.equal(a, b)
            for shard in SHARDS
            for a, b in zip(sweep.quantized[shard], unshifted.quantized[shard], strict=True)
        )


def test_each_layer_runs_once_a_stream_and_nothing_inside_a_block_outlives_it(folder: Path) -> None:
    sweep = sweep_of(folder)
    ran: Counter[tuple[str, int]] = Counter()
    for index, block in sweep.stream.stream(range(LAYERS)):
        for path, layer in block.named_modules():
            if isinstance(layer, nn.Linear):
                layer.register_forward_hook(lambda *_, name=(path, index): ran.update([name]))
        before = {shard: [batch.clone() for batch in batches] for shard, batches in sweep.original.items()}
        quantized: dict[str, Tensor] = {}
        for site in sweep.stream.sites(index).values():
            sweep.products(index, block, site, None, quantized)
            quantized |= {spec.name: replacement(spec, sweep.stream.weight(spec)) for spec in site}
        sweep.advance(index, block, quantized)
        assert not sweep._known
        for shard, batches in before.items():
            for here, there in zip(batches, sweep.original[shard], strict=True):
                assert torch.equal(sweep.stream.run(block, index, here), there)
    micro_batches = sum(len(batches) for batches in sweep.quantized.values())
    ran.subtract(dict.fromkeys(ran, micro_batches))  # of the plain forward just above
    assert len(ran) == 7 * LAYERS
    assert set(ran.values()) == {2 * micro_batches}


def test_sums_of_the_last_site_are_taken_once(folder: Path) -> None:
    sweep = sweep_of(folder)
    with sweep.stream.block(0) as block:
        sites = sweep.stream.sites(0)
        for site in sites.values():
            sweep.products(0, block, site, None, {})
        with pytest.raises(RuntimeError, match="taken before"):
            sweep.products(0, block, sites["down"], None, {})


# --- one layer ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["qkv", "o", "gate_up", "down"])
def layer(request: pytest.FixtureRequest, folder: Path) -> tuple[Tensor, SiteProducts, Tensor, Tensor]:
    """A layer of the second block behind a first block at 3 bits: W, its products, the outputs that would make good for
    what is lost [tokens, d_out] and xq [tokens, d_in]."""
    sweep = sweep_of(folder)
    original: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    changed: Any = copy.deepcopy(original)
    for spec in sweep.stream.block_specs(0):
        linear = changed.get_submodule(spec.name)
        linear.weight.data = replacement(spec, linear.weight.detach())
    done = {spec.name: changed.get_submodule(spec.name).weight.data for spec in sweep.stream.block_specs(0)}
    for index, block in sweep.stream.stream(range(2)):
        if index == 0:
            sweep.advance(0, block, done)
            continue
        site = sweep.stream.sites(1)[request.param]
        products = root(sweep.products(1, block, site, token_weights(), {}), 2, merge_products)
        W = original.get_submodule(site[0].name).weight.detach().clone()
        x, xq = inputs_of(original, site[0].name), inputs_of(changed, site[0].name)
        target = x @ W.double().T
        if request.param in ADDED:
            target += added_to(original, site[0].name) - added_to(changed, site[0].name)
        return W, products, target, xq
    raise AssertionError


def error_of_rows(target: Tensor, Q: Tensor, xq: Tensor) -> Tensor:
    """Weighted mean over tokens of (target - Q xq)^2, from the tokens themselves."""
    s = WEIGHTS.double()
    return ((target - xq @ Q.double().T).square() * s[:, None]).sum(0) / s.sum()


def pull_of(W: Tensor, products: SiteProducts) -> Tensor:
    """W D or P, float64, a mean over tokens."""
    if products.pull is not None:
        return products.pull.double() / products.hessian.weight_sum
    assert products.shift is not None
    return W.double() @ products.shift.double() / products.hessian.weight_sum


def test_every_row_keeps_the_better_codes(layer: tuple[Tensor, SiteProducts, Tensor, Tensor]) -> None:
    W, products, wanted, xq = layer
    refined = quantize_refined(W, products, CHOICE, strength=0.5, **HOW)
    plain = quantize_refined(W, products, CHOICE, strength=0.0, **HOW)
    # the corrected weights by plain linear algebra in float64
    C = normalized(products.hessian).double()
    damped = C + 0.05 * C.diagonal().mean() * torch.eye(len(C))
    target = (W.double() + 0.5 * pull_of(W, products) @ torch.linalg.inv(damped)).float()
    factor = factorize(C.float(), damping=0.01)
    corrected = gptq(target, factor, [CHOICE], grid=GRID)[0]

    errors = [error_of_rows(wanted, q.dequantize(), xq) for q in (refined.weight, plain.weight, corrected)]
    torch.testing.assert_close(errors[0], torch.minimum(errors[1], errors[2]), rtol=1e-2, atol=0)
    assert refined.rejected_rows == pytest.approx(int((errors[2] > errors[1]).sum()), abs=1)
    assert refined.rows == len(W)
    # On average the correction pays: it is what refinement is for.
    assert errors[0].sum() < 0.97 * errors[1].sum()


def test_polish_raises_the_error_of_no_row_and_lowers_that_of_some(
    layer: tuple[Tensor, SiteProducts, Tensor, Tensor],
) -> None:
    W, products, wanted, xq = layer
    for given, strength in ((products, 0.5), (SiteProducts(hessian=products.hessian, shift=None), 0.0)):
        rounded = quantize_refined(W, given, CHOICE, strength=strength, **HOW)
        polished = quantize_refined(W, given, CHOICE, strength=strength, **POLISHED)
        target = wanted if strength else xq @ W.double().T
        before, after = (error_of_rows(target, r.weight.dequantize(), xq) for r in (rounded, polished))
        assert bool((after <= before * (1 + 1e-4)).all())
        assert int((after < before).sum()) >= 4  # a tiny layer of many tokens: little is left to win
        assert after.sum() < before.sum()
        assert polished.rejected_rows == rounded.rejected_rows


def test_codes_are_one_of_the_two_row_by_row(layer: tuple[Tensor, SiteProducts, Tensor, Tensor]) -> None:
    W, products, _, _ = layer
    refined = quantize_refined(W, products, CHOICE, strength=1.0, **HOW)
    plain = quantize_refined(W, products, CHOICE, strength=0.0, **HOW)
    same = (refined.weight.codes == plain.weight.codes).all(1) & (refined.weight.scales == plain.weight.scales).all(1)
    assert int(same.sum()) == refined.rejected_rows
    assert refined.rejected_rows < refined.rows


def test_without_strength_it_is_plain_gptq(layer: tuple[Tensor, SiteProducts, Tensor, Tensor]) -> None:
    W, products, _, _ = layer
    expected = gptq(W, factorize(normalized(products.hessian), damping=0.01), [CHOICE], grid=GRID)[0]
    without = SiteProducts(hessian=products.hessian, shift=None)
    for given, strength in ((products, 0.0), (without, 0.5)):
        found = quantize_refined(W, given, CHOICE, strength=strength, **HOW)
        assert torch.equal(found.weight.codes, expected.codes)
        assert torch.equal(found.weight.scales, expected.scales)
        assert found.rejected_rows == 0


def test_behind_an_unchanged_prefix_there_is_nothing_to_correct(
    layer: tuple[Tensor, SiteProducts, Tensor, Tensor],
) -> None:
    W, products, _, _ = layer
    unchanged = SiteProducts(hessian=products.hessian, shift=torch.zeros_like(products.hessian.xx))
    refined = quantize_refined(W, unchanged, CHOICE, strength=1.0, **HOW)
    plain = quantize_refined(W, products, CHOICE, strength=0.0, **HOW)
    assert torch.equal(refined.weight.codes, plain.weight.codes)
    assert refined.rejected_rows == 0
