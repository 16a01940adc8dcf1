"""Perplexity and KL divergence, block by block, against two whole plain models and the ruler's arithmetic."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_llama
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from lrpq.errors import CheckpointError
from lrpq.evaluate.divergence import ORIGINAL, WindowScore, score_windows, summarize
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.streaming import BlockStream

WINDOWS, LENGTH, VOCABULARY, LAYERS = 5, 20, 128, 3
TOKENS = torch.randint(VOCABULARY, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(3))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return DTYPES[request.param]


@pytest.fixture(scope="module")
def folder(dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_llama(tmp_path_factory.mktemp("divergence") / "llama", layers=LAYERS)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.02)  # perplexities of a few hundred, not of 1e17
    model.to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture
def stream(folder: Path, dtype: torch.dtype) -> BlockStream:
    return BlockStream(ModelSource(folder), dtype=dtype)


def plain(folder: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def changed_weights(model: Any, *, noise: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        name.removesuffix(".weight"): p.detach() + noise * torch.randn(p.shape, generator=generator).to(p.dtype)
        for name, p in model.named_parameters()
        if "_proj" in name and "layers.1.self_attn.o_proj" not in name  # one is left as it is
    }


def with_weights(model: Any, weights: Mapping[str, Tensor]) -> Any:
    found = copy.deepcopy(model)
    for name, W in weights.items():
        found.get_submodule(name).weight.data = W.clone()
    return found


def by_block(weights: Mapping[str, Tensor]) -> Callable[[int], dict[str, Tensor]]:
    return lambda block: {name: W for name, W in weights.items() if name.startswith(f"model.layers.{block}.")}


def ruler(original: Any, variant: Any) -> dict[str, Any]:
    """What the project's ruler computes: a window at a time, log-probabilities in float32, means of means."""
    nll = agree = 0.0
    kls = []
    with torch.no_grad():
        for x in TOKENS:
            r, q = (m(x[None]).logits[0, :-1].float().log_softmax(-1) for m in (original, variant))
            nll += functional.nll_loss(q, x[1:]).item()
            kls.append((r.exp() * (r - q)).sum(-1).mean().item())
            agree += (r.argmax(-1) == q.argmax(-1)).float().mean().item()
    k = torch.tensor(kls, dtype=torch.float64)
    return {
        "perplexity": math.exp(nll / WINDOWS),
        "kl": k.mean().item(),
        "error": (k.std() / math.sqrt(WINDOWS)).item(),
        "top1": agree / WINDOWS,
        "windows": kls,
    }


def test_scores_are_those_of_two_plain_models(folder: Path, stream: BlockStream, dtype: torch.dtype) -> None:
    original = plain(folder, dtype)
    weights = {name: changed_weights(original, noise=noise) for name, noise in (("near", 0.02), ("far", 0.1))}
    variants = {name: by_block(found) for name, found in weights.items()}
    scores = score_windows(stream, TOKENS, variants)
    assert set(scores) == {ORIGINAL, "near", "far"}
    near, far = (ruler(original, with_weights(original, weights[name])) for name in ("near", "far"))
    assert 0.001 < near["kl"] < 0.5 * far["kl"]  # the test means something
    for name, wanted in (("near", near), ("far", far), (ORIGINAL, ruler(original, original))):
        found = summarize(scores[name])
        assert found.perplexity == pytest.approx(wanted["perplexity"], rel=1e-5)
        assert found.kl_nats == pytest.approx(wanted["kl"], rel=1e-4, abs=1e-9)
        assert found.kl_standard_error == pytest.approx(wanted["error"], rel=1e-4, abs=1e-9)
        assert found.top1 == pytest.approx(wanted["top1"], abs=1e-6)
        assert [s.kl_nats for s in scores[name]] == pytest.approx(wanted["windows"], rel=1e-4, abs=1e-9)
    assert all(score.kl_nats == 0.0 and score.top1 == 1.0 for score in scores[ORIGINAL])


def test_a_window_scores_the_same_whatever_is_scored_with_it(stream: BlockStream, dtype: torch.dtype) -> None:
    weights = changed_weights(plain(stream.source.folder, dtype), noise=0.05)
    together = score_windows(stream, TOKENS, {"v": by_block(weights)})
    for i in (0, 3):
        alone = score_windows(stream, TOKENS[i : i + 1], {"v": by_block(weights), "w": by_block({})})
        assert alone["v"] == together["v"][i : i + 1]
        assert alone["w"] == alone[ORIGINAL]
    batched = score_windows(stream, TOKENS, {"v": by_block(weights)}, micro_batch=3)
    found = [s.kl_nats for s in batched["v"]]
    assert found == pytest.approx([s.kl_nats for s in together["v"]], rel=1e-3 if dtype is torch.float32 else 0.05)


def test_the_first_token_is_context_only(stream: BlockStream, dtype: torch.dtype) -> None:
    other = TOKENS.clone()
    other[:, -1] = (other[:, -1] + 1) % VOCABULARY  # the last token is predicted, and predicts nothing
    weights = {"v": by_block(changed_weights(plain(stream.source.folder, dtype), noise=0.05))}
    a, b = score_windows(stream, TOKENS, weights)["v"], score_windows(stream, other, weights)["v"]
    assert [s.kl_nats for s in a] == [s.kl_nats for s in b]
    assert all(s.nll_nats != t.nll_nats for s, t in zip(a, b, strict=True))


def test_logits_that_are_not_finite_are_an_error(stream: BlockStream) -> None:
    broken = {"model.layers.2.mlp.down_proj": torch.full((64, 128), math.nan)}
    with pytest.raises(CheckpointError, match="variant broken: logits are not finite"):
        score_windows(stream, TOKENS, {"broken": by_block(broken)})


def test_variants_leave_the_original_alone(stream: BlockStream, dtype: torch.dtype) -> None:
    weights = changed_weights(plain(stream.source.folder, dtype), noise=0.3)
    assert (
        score_windows(stream, TOKENS, {"v": by_block(weights)})[ORIGINAL]
        == (score_windows(stream, TOKENS, {})[ORIGINAL])
    )


def test_summary_of_scores_made_by_hand() -> None:
    scores = [WindowScore(nll_nats=n, kl_nats=k, top1=t) for n, k, t in ((1.0, 0.1, 0.5), (3.0, 0.4, 1.0))]
    found = summarize(scores)
    assert found.perplexity == pytest.approx(math.exp(2.0))
    assert found.kl_nats == pytest.approx(0.25)
    assert found.kl_standard_error == pytest.approx(0.15)  # sqrt(0.045) / sqrt(2)
    assert found.top1 == pytest.approx(0.75)
    assert summarize(scores[:1]).kl_standard_error is None
