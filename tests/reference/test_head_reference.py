"""The head as one more layer: its sums against a plain model in float64, and a variant's head against a plain one."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_llama
from tiny_models import write_tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lrpq.errors import QuantizationError
from lrpq.evaluate.divergence import ORIGINAL, score_windows, summarize
from lrpq.model.kept import KeptInputs
from lrpq.model.layers import HEAD
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.streaming import BlockStream
from lrpq.quant.hessian import normalized
from lrpq.relevance.composite import Relevance
from lrpq.relevance.head import sequence_generator
from lrpq.relevance.sweep import BlockSums, ProfileSweep, Shard, merge_block_sums
from lrpq.shards import Node, assign, root, split

WINDOWS, LENGTH, NUM_SHARDS, MICRO_BATCH, SEED = 7, 300, 3, 2, 5  # a window is more than one chunk of logits
TOKENS = torch.randint(120, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(3))
CAP = 2.0


@pytest.fixture(scope="module", params=["llama", "capped", "projected"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untied: plain; with capped logits; with a projection between the last block and the head."""
    folder: Path = tmp_path_factory.mktemp("head") / request.param
    if request.param == "capped":
        return write_tiny(folder, "gemma2", tie_word_embeddings=False, final_logit_softcapping=CAP, **LONG)
    if request.param == "projected":
        return write_tiny(folder, "opt-post-norm", tie_word_embeddings=False, **LONG)
    model = AutoModelForCausalLM.from_pretrained(write_llama(folder))
    model.lm_head.weight.data.mul_(0.02)  # logits of a few units
    model.save_pretrained(folder)
    return folder


LONG = {"max_position_embeddings": 512}


def sweep(folder: Path, shards: range, *, with_head: bool = True) -> ProfileSweep:
    spans = split(WINDOWS, NUM_SHARDS)
    found = ProfileSweep(
        BlockStream(ModelSource(folder), dtype=torch.float32),
        [Shard(index=i, first_window=spans[i].start, tokens=TOKENS[spans[i].start : spans[i].stop]) for i in shards],
        num_shards=NUM_SHARDS,
        relevance=Relevance.FISHER,
        floor=0.03,
        power=0.5,
        seed=SEED,
        micro_batch=MICRO_BATCH,
        kept=KeptInputs(memory_bytes=1 << 30),
        with_head=with_head,
    )
    found.embed()
    for index, block in found.stream.stream(range(found.stream.num_blocks)):
        found.forward(index, block)
    found.seed_gradients()
    return found


def head_sums(folder: Path, num_workers: int) -> BlockSums:
    nodes: dict[Node, BlockSums] = {}
    for shards in assign(NUM_SHARDS, num_workers):
        nodes |= sweep(folder, shards).head_sums
    return root(nodes, NUM_SHARDS, merge_block_sums)


def expected(folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """H [d_in, d_in], c [d_out] and the trace from a whole plain model in float64 and its own autograd."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    seen: dict[str, Tensor] = {}

    def remember(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        seen["x"], seen["z"] = arguments[0].detach(), output

    model.get_output_embeddings().register_forward_hook(remember)
    logits = model(TOKENS, use_cache=False).logits.double()
    p = logits.detach().softmax(-1)
    uniform = torch.stack(
        [torch.rand(LENGTH, dtype=torch.float64, generator=sequence_generator(SEED, i)) for i in range(WINDOWS)]
    )
    labels = (p.cumsum(-1) <= uniform[..., None]).sum(-1)
    nats = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    (gradient,) = torch.autograd.grad(nats, seen["z"])
    X = seen["x"].flatten(0, 1)
    g2 = gradient.flatten(0, 1).square()
    return X.T @ X / len(X), g2.mean(0), (g2.sum(1) * X.square().sum(1)).mean()


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def test_sums_are_those_of_a_plain_model(folder: Path) -> None:
    found = head_sums(folder, 1)
    H, c, trace = expected(folder)
    (hessian,), (curvature,), (traced,) = (part.values() for part in (found.hessians, found.curvature, found.traces))
    assert found.num_tokens == hessian.num_tokens == hessian.weight_sum == WINDOWS * LENGTH
    assert distance(normalized(hessian), H) < 1e-5
    assert curvature.dtype == torch.float64
    assert distance(curvature / found.num_tokens, c) < 1e-4
    assert float(traced.sum()) / found.num_tokens == pytest.approx(float(trace), rel=1e-4)


def test_bytes_do_not_depend_on_the_number_of_workers(folder: Path) -> None:
    one = head_sums(folder, 1)
    for num_workers in (2, 4):  # with four workers one has nothing to do
        other = head_sums(folder, num_workers)
        assert torch.equal(other.hessians[HEAD].xx, one.hessians[HEAD].xx)
        assert other.hessians[HEAD].weight_sum == one.hessians[HEAD].weight_sum
        assert other.curvature.keys() == one.curvature.keys()
        assert all(torch.equal(c, one.curvature[name]) for name, c in other.curvature.items())


def test_the_gradients_are_the_same_with_and_without_the_head(folder: Path) -> None:
    plain, watching = (sweep(folder, range(NUM_SHARDS), with_head=asked) for asked in (False, True))
    assert plain.head_sums == {}
    for place, gradients in plain.upstream.items():
        assert all(torch.equal(g, watching.upstream[place][p]) for p, g in gradients.items())


def test_spec_of_the_head(folder: Path, tmp_path: Path) -> None:
    stream = BlockStream(ModelSource(folder), dtype=torch.float32)
    spec = stream.head_spec
    assert spec is not None
    assert spec not in stream.specs
    assert (spec.name, spec.block, spec.input_site, spec.fused_group) == ("lm_head", stream.num_blocks, HEAD, "lm_head")
    assert (spec.d_out, spec.d_in) == tuple(stream.source.shape(spec.stored[0]))
    renamed = BlockStream(ModelSource(write_tiny(tmp_path / "neox", "gpt-neox", **LONG)), dtype=torch.float32).head_spec
    assert renamed == replace(spec, block=2, d_out=320, d_in=64, tensors=("embed_out.weight",))


def test_a_tied_head_is_no_layer_of_its_own(tmp_path: Path) -> None:
    tied = write_llama(tmp_path, tied=True)
    assert BlockStream(ModelSource(tied), dtype=torch.float32).head_spec is None
    with pytest.raises(QuantizationError, match="lm_head: its weight is the embedding's"):
        sweep(tied, range(1))


def test_a_variants_head_scores_as_a_plain_model_with_that_head(folder: Path) -> None:
    stream = BlockStream(ModelSource(folder), dtype=torch.float32)
    original: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    changed: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    head = changed.get_output_embeddings().weight
    noise = torch.randn(head.shape, generator=torch.Generator().manual_seed(1))
    head.data += 0.1 * head.data.abs().mean() * noise
    tokens = TOKENS[:2, :40]
    scores = score_windows(
        stream,
        tokens,
        {
            "head": lambda block: {"lm_head": head.detach()} if block == stream.num_blocks else {},
            "same": lambda block: {},
        },
    )
    assert scores["same"] == scores[ORIGINAL]
    kls = []
    with torch.no_grad():
        for x in tokens:
            r, q = (m(x[None]).logits[0, :-1].log_softmax(-1) for m in (original, changed))
            kls.append(float((r.exp() * (r - q)).sum(-1).mean()))
    found = summarize(scores["head"])
    assert found.kl_nats > 1e-5
    assert found.kl_nats == pytest.approx(math.fsum(kls) / len(kls), rel=1e-3)
    assert summarize(scores[ORIGINAL]).kl_nats == 0.0
