"""Image classifiers in the block stream: the model's own forward, and relevance against one plain backward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_images import CLASSES, IMAGE_CASES, build_classifier, images, write_classifier
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from lrpq.errors import CalibrationError, ModelError
from lrpq.model.families import CLASSIFIERS
from lrpq.model.kept import KeptInputs
from lrpq.model.source import open_source
from lrpq.model.streaming import BlockStream
from lrpq.quant.hessian import normalized
from lrpq.relevance.composite import Relevance
from lrpq.relevance.head import sample_labels, sequence_generator
from lrpq.relevance.patches import patch_relevance
from lrpq.relevance.rules import Pass
from lrpq.relevance.sweep import ProfileSweep, Shard, merge_block_sums
from lrpq.shards import root

SEED = 5
PATCHES = {"swin": (8, 8), "swin-padded": (10, 9)}
SPECIAL = {"deit": 2, "swin": 0, "swin-padded": 0}


def num_tokens(name: str) -> int:
    """Of an image, at the first block."""
    rows, columns = PATCHES.get(name, (4, 4))
    return rows * columns + SPECIAL.get(name, 1)


def stream_of(folder: Path, dtype: torch.dtype = torch.float32) -> BlockStream:
    return BlockStream(open_source(folder), dtype=dtype)


def test_every_classifier_has_a_case() -> None:
    assert {architecture for architecture, _, _ in IMAGE_CASES.values()} == set(CLASSIFIERS)


@pytest.mark.parametrize("name", IMAGE_CASES)
@torch.no_grad()
def test_streamed_forward_equals_the_models_own(name: str, tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "model", name)
    own = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32)
    stream, x = stream_of(folder), images(3, name)
    hidden = stream.embed(x)
    for index, block in stream.stream(range(stream.num_blocks)):
        hidden = stream.run(block, index, hidden)
    with stream.head() as (tail, head):
        logits = head(tail(hidden))
    assert logits.shape == (3, 1, CLASSES)
    assert torch.equal(logits[:, 0], own(pixel_values=x).logits)
    expected = [6, 6, 1, 6, 6] if "swin" in name else [6, 6]
    assert [len(stream.block_specs(i)) for i in range(stream.num_blocks)] == expected


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    stream = stream_of(write_classifier(tmp_path / "model", "vit"))
    with pytest.raises(CalibrationError, match=r"shape \[3, 8, 8\].*reads \[3, 16, 16\]"):
        stream.embed(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("name", IMAGE_CASES)
def test_fisher_profile_is_that_of_a_plain_backward_pass(name: str, tmp_path: Path) -> None:
    """Labels drawn from the model's own softmax, one an image; curvature and Hessian of every layer, in float64."""
    stream = stream_of(write_classifier(tmp_path / "model", name), torch.float64)
    x = images(5, name)
    own: Any = AutoModelForImageClassification.from_pretrained(tmp_path / "model", dtype=torch.float64)
    seen: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}

    def watch(module_name: str, module: nn.Module) -> None:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            seen[module_name] = arguments[0].detach().flatten(0, -2)
            output.register_hook(lambda g: gradients.__setitem__(module_name, g.flatten(0, -2)))

        module.register_forward_hook(hook)

    for spec in stream.specs:
        watch(spec.name, own.get_submodule(spec.name))
    logits = own(pixel_values=x.double()).logits
    labels = torch.cat([sample_labels(logits[i : i + 1].detach(), sequence_generator(SEED, i)) for i in range(len(x))])
    nats = nn.functional.cross_entropy(logits, labels, reduction="sum")
    nats.backward()

    shards = [Shard(index=0, first_window=0, tokens=x[:3]), Shard(index=1, first_window=3, tokens=x[3:])]
    with KeptInputs(memory_bytes=1 << 30) as kept:
        sweep = ProfileSweep(
            stream,
            shards,
            num_shards=2,
            relevance=Relevance.FISHER,
            floor=0.0,
            power=1.0,
            seed=SEED,
            micro_batch=2,
            kept=kept,
        )
        sweep.embed()
        for index, block in stream.stream(range(stream.num_blocks)):
            sweep.forward(index, block)
        loss, num_labels = sweep.seed_gradients()
        assert num_labels == len(x)
        assert loss == pytest.approx(float(nats.detach()), rel=1e-9)
        for index, block in stream.stream(range(stream.num_blocks - 1, -1, -1)):
            sums = root(sweep.backward(index, block)[0], 2, merge_block_sums)
            for site, members in stream.sites(index).items():
                assert sums.num_tokens == sums.num_explained == len(x) * num_tokens(name)
                s = torch.stack([gradients[m.name].square().mean(1) for m in members]).mean(0)
                x_t = seen[members[0].name]
                H = (x_t * s[:, None]).T @ x_t / s.sum()
                torch.testing.assert_close(normalized(sums.hessians[site]).double(), H, rtol=1e-4, atol=1e-5)
                for m in members:
                    torch.testing.assert_close(sums.curvature[m.name], gradients[m.name].square().sum(0))


@pytest.mark.parametrize("name", IMAGE_CASES)
def test_patches_and_special_tokens_share_out_the_logit(name: str, tmp_path: Path) -> None:
    """CP-LRP without biases conserves: what all tokens have is the logit, whichever class is asked for."""
    model = build_classifier(name)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias") and "patch_embeddings" not in parameter_name:
            parameter.data.zero_()
    model.save_pretrained(tmp_path / "model")
    stream, x = stream_of(tmp_path / "model", torch.float64), images(3, name)
    asked = torch.tensor([4, 0, 9])
    found = patch_relevance(stream, x, running=Pass.CP_LRP, classes=asked)
    assert found.patches.shape[1:] == PATCHES.get(name, (4, 4))
    assert found.special.shape[1] == SPECIAL.get(name, 1)
    torch.testing.assert_close(found.patches.sum((1, 2)) + found.special.sum(1), found.logits)
    own: Any = AutoModelForImageClassification.from_pretrained(tmp_path / "model", dtype=torch.float64)
    torch.testing.assert_close(found.logits, own(pixel_values=x.double()).logits.detach()[range(3), asked])


def test_without_rules_relevance_is_gradient_times_input(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "model", "vit")
    x = images(2)
    own: Any = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float64)
    leaves: list[Tensor] = []

    def cut(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[0]

    own.vit.embeddings.register_forward_hook(cut)
    logits = own(pixel_values=x.double()).logits
    logits.amax(-1).sum().backward()
    assert leaves[0].grad is not None
    expected = (leaves[0] * leaves[0].grad).sum(-1).detach()
    found = patch_relevance(stream_of(folder, torch.float64), x, running=Pass.FISHER)
    assert torch.equal(found.classes, logits.argmax(-1))
    torch.testing.assert_close(found.patches.flatten(1), expected[:, 1:])
    torch.testing.assert_close(found.special, expected[:, :1])
    ruled = patch_relevance(stream_of(folder, torch.float64), x)
    assert not torch.allclose(ruled.patches, found.patches)


def test_a_language_model_has_no_patches(tmp_path: Path) -> None:
    from tiny_models import write_tiny

    with pytest.raises(ModelError, match="OPTForCausalLM does not classify images"):
        patch_relevance(stream_of(write_tiny(tmp_path / "model", "opt")), images(1))
