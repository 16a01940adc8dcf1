"""Swin against one dense attention over the whole plane: relevance, and the sums that refinement takes in windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dense_swin
import pytest
import torch
from tiny_images import CLASSES, images, write_classifier
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from lrpq.errors import ModelError, QuantizationError
from lrpq.importance.evidence import ModuleEvidence
from lrpq.importance.gather import GatherSweep, means
from lrpq.importance.rankings import layer_input_modification
from lrpq.model.kept import KeptInputs
from lrpq.model.layers import LinearSpec
from lrpq.model.source import open_source
from lrpq.model.streaming import BlockStream
from lrpq.quant.factor import factorize
from lrpq.quant.grid import Grid
from lrpq.quant.hessian import normalized
from lrpq.refine.products import merge_products
from lrpq.refine.sweep import RefineSweep
from lrpq.relevance.composite import Relevance
from lrpq.relevance.head import sample_labels, sequence_generator
from lrpq.relevance.patches import patch_relevance
from lrpq.relevance.rules import Pass
from lrpq.relevance.sweep import Shard
from lrpq.shards import root

PLANES = {"swin": (8, 8), "swin-padded": (10, 9)}
SEED, SHIFTED = 5, 1
"""The block whose windows are shifted."""


def stream_of(folder: Path, dtype: torch.dtype = torch.float64, attention: str | None = None) -> BlockStream:
    return BlockStream(open_source(folder), dtype=dtype, attention=attention)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("running", list(Pass))
@pytest.mark.parametrize("name", PLANES)
def test_relevance_is_that_of_dense_attention(name: str, running: Pass, attention: str, tmp_path: Path) -> None:
    """From a logit through pooling, merging and shifted windows down to the patches, in float64."""
    folder = write_classifier(tmp_path / "model", name)
    stream, x = stream_of(folder, attention=attention), images(2, name)
    classes = torch.tensor([3, CLASSES - 1])
    found = patch_relevance(stream, x, running=running, classes=classes)
    own: Any = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float64)
    hidden = own.swin.embeddings(x.double())[0].detach().requires_grad_()
    height, width = PLANES[name]
    logits = dense_swin.logits(own, hidden, height=height, width=width, running=running)
    chosen = logits[torch.arange(2), classes]
    (gradient,) = torch.autograd.grad(chosen.sum(), hidden)
    tolerance = {"rtol": 1e-5, "atol": 1e-7} if attention == "eager" else {"rtol": 1e-8, "atol": 1e-10}
    torch.testing.assert_close(found.logits, chosen.detach(), **tolerance)
    expected = (hidden * gradient).sum(-1).detach()
    torch.testing.assert_close(found.patches.flatten(1), expected, **tolerance)
    assert found.special.shape == (2, 0)


def test_images_that_are_padded_to_patches_have_no_map(tmp_path: Path) -> None:
    stream = stream_of(write_classifier(tmp_path / "model", "swin", image_size=[15, 16]))
    with pytest.raises(ModelError, match="64 tokens are not 7 x 8 patches"):
        patch_relevance(stream, torch.zeros(1, 3, 15, 16))


def rearranged(x: Tensor, name: str, block: int) -> Tensor:
    """Hidden states [n, t, h] of a block of the first stage in the order in which its attention reads them, as rows."""
    height, width = PLANES[name]
    places = dense_swin.plane(height, width, size=4, shift=2 if block == SHIFTED else 0)
    return dense_swin.in_windows(x, places, height=height, width=width).flatten(0, 1)


@pytest.mark.parametrize("name", PLANES)
@torch.no_grad()
def test_refinement_makes_good_the_hidden_states_in_the_order_of_windows(name: str, tmp_path: Path) -> None:
    """P of both units of a shifted block behind a changed one, by hand; D of the merging behind it."""
    stream, x = stream_of(write_classifier(tmp_path / "model", name), torch.float32), images(6, name)
    sweep = RefineSweep(stream, {0: x[:4], 1: x[4:]}, num_shards=2, micro_batch=3, with_shift=True)
    sweep.embed()
    changes = {
        spec.name: stream.weight(spec) * 1.1 + 0.01
        for block in (0, SHIFTED)
        for site in ("qkv", "up")
        for spec in stream.sites(block)[site]
    }

    def changed(block: int) -> dict[str, Tensor]:
        return {spec.name: changes[spec.name] for spec in stream.block_specs(block) if spec.name in changes}

    first = {"original": stream.embed(x), "changed": stream.embed(x)}
    with stream.block(0) as block:
        sweep.advance(0, block, changed(0))
        first["original"] = stream.run(block, 0, first["original"])
        with stream.swapped(block, changed(0)):
            first["changed"] = stream.run(block, 0, first["changed"])
    with stream.block(SHIFTED) as block:
        sites = stream.sites(SHIFTED)
        found = {
            site: root(sweep.products(SHIFTED, block, sites[site], None, changed(SHIFTED)), 2, merge_products)
            for site in ("o", "down")
        }
        seen: dict[str, list[Tensor]] = {"o": [], "down": [], "added_to": []}
        watched = {"o": "attention.o_proj", "down": "mlp.fc2", "added_to": "layernorm_after"}
        handles = [
            block.get_submodule(path).register_forward_pre_hook(
                lambda _, arguments, key=key: seen[key].append(arguments[0].flatten(0, 1))
            )
            for key, path in watched.items()
        ]
        outputs = {"original": stream.run(block, SHIFTED, first["original"])}
        with stream.swapped(block, changed(SHIFTED)):
            outputs["changed"] = stream.run(block, SHIFTED, first["changed"])
        for handle in handles:
            handle.remove()
        r = {
            "o": [rearranged(first[which], name, SHIFTED) for which in ("original", "changed")],
            "down": seen["added_to"],
        }
        for site in ("o", "down"):
            (x_t, xq), (r_t, rq) = seen[site], r[site]
            W = block.get_submodule(watched[site]).weight
            assert found[site].shift is None
            torch.testing.assert_close(found[site].pull, ((x_t - xq) @ W.T + r_t - rq).T @ xq, rtol=2e-4, atol=2e-3)
            torch.testing.assert_close(normalized(found[site].hessian), xq.T @ xq / len(xq), rtol=1e-4, atol=1e-4)
        sweep.advance(SHIFTED, block, changed(SHIFTED))
    merging = SHIFTED + 1
    with stream.block(merging) as block:
        total = root(sweep.products(merging, block, stream.sites(merging)["merge"], None, {}), 2, merge_products)
        inputs: list[Tensor] = []
        block.get_submodule("reduction").register_forward_pre_hook(lambda _, a: inputs.append(a[0].flatten(0, 1)))
        for which in ("original", "changed"):
            stream.run(block, merging, outputs[which])
    x_t, xq = inputs
    torch.testing.assert_close(total.shift, (x_t - xq).T @ xq, rtol=2e-4, atol=2e-3)


def evidence_of(spec: LinearSpec) -> ModuleEvidence:
    """Of a layer in a block without a cosine; the rest is not read."""
    return ModuleEvidence(
        spec=spec,
        W=torch.ones(1, 1),
        candidates=(),
        rounded=(),
        factor=factorize(torch.ones(1, 1)),
        grid=Grid.SIGNED,
        hessians={},
        curvature={},
        trace=0.0,
        bounded_trace=0.0,
        relevance=0.0,
        block_cosine=None,
    )


def test_evidence_of_all_stages_is_a_mean_over_the_first_blocks_tokens(tmp_path: Path) -> None:
    """Curvature of every layer against one plain backward pass; and no cosine where tokens are merged."""
    stream, x = stream_of(write_classifier(tmp_path / "model", "swin")), images(3, "swin")
    with KeptInputs(memory_bytes=1 << 30) as kept:
        sweep = GatherSweep(
            stream,
            [Shard(index=0, first_window=0, tokens=x)],
            num_shards=1,
            relevance=Relevance.NONE,
            floor=0.0,
            power=1.0,
            seed=SEED,
            micro_batch=2,
            kept=kept,
            weightings=("fisher",),
        )
        sweep.embed()
        for index, block in stream.stream(range(stream.num_blocks)):
            sweep.forward(index, block)
        sweep.seed_gradients()
        found = {}
        for index, block in stream.stream(range(stream.num_blocks - 1, -1, -1)):
            found[index] = sweep.gather(index, block)
    own: Any = AutoModelForImageClassification.from_pretrained(tmp_path / "model", dtype=torch.float64)
    squares: dict[str, Tensor] = {}

    def watch(name: str) -> None:
        def keep(g: Tensor) -> None:
            squares[name] = g.flatten(0, -2).square().sum(0)

        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            output.register_hook(keep)

        own.get_submodule(name).register_forward_hook(hook)

    for spec in stream.specs:
        watch(spec.name)
    logits = own(pixel_values=x.double()).logits
    labels = torch.cat([sample_labels(logits[i : i + 1].detach(), sequence_generator(SEED, i)) for i in range(3)])
    nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    for spec in stream.specs:
        c = means(found[spec.block])[spec.name][Pass.FISHER]
        torch.testing.assert_close(c, squares[spec.name] / (3 * 64))
    merging = stream.block_specs(2)[0]
    with pytest.raises(QuantizationError, match=r"downsample\.reduction: the measure lim .*merges tokens"):
        layer_input_modification(evidence_of(merging))
    assert [found[index].cosine is None for index in range(5)] == [False, False, True, False, False]
    assert all(-1 <= evidence.cosine <= 1 for evidence in found.values() if evidence.cosine is not None)
