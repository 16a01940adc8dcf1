"""Windows sampled from a model: the right distribution, the cache, and batches that change nothing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lrpq.errors import CalibrationError, ConfigError, ModelError
from tasks.calibration import load_windows, parse_source, sample_windows, sampling, self_windows
from tasks.calibration.sampling import CachedStep

CHAIN = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.0, 0.5], [0.2, 0.2, 0.6]], dtype=torch.float64)


def chain(tokens: Tensor) -> Tensor:
    """A Markov chain: the next token depends on the last one alone; 1 never follows 1."""
    return CHAIN[tokens[:, -1]].clamp_min(1e-300).log()


def make_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_transitions_have_the_models_frequencies(temperature: float) -> None:
    rows = sample_windows(
        chain, num_windows=60, length=300, bos=0, seed=5, temperature=temperature, batch_size=60
    ).tokens
    expected = CHAIN ** (1 / temperature)
    expected /= expected.sum(1, keepdim=True)
    for last in range(3):
        following = rows[:, 1:][rows[:, :-1] == last]
        for token in range(3):
            p = expected[last, token].item()
            deviation = math.sqrt(p * (1 - p) / len(following))
            assert abs((following == token).double().mean().item() - p) <= 4 * deviation
    assert len(torch.unique(rows, dim=0)) == 60


def test_a_certain_model_is_followed_exactly() -> None:
    def counts_up(tokens: Tensor) -> Tensor:
        return torch.nn.functional.one_hot((tokens[:, -1] + 1) % 7, 7) * 1000.0

    got = sample_windows(counts_up, num_windows=3, length=10, bos=4, seed=0)
    assert got.tokens.tolist() == [[4, 5, 6, 0, 1, 2, 3, 4, 5, 6]] * 3
    assert got.tokens.dtype == torch.int64


def test_an_impossible_token_is_not_drawn_at_the_very_edge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_uniforms", lambda _seed, _index, count: torch.zeros(count).double())
    got = sample_windows(lambda _tokens: torch.tensor([[-1e30, 0.0, 0.0]]), num_windows=1, length=3, bos=2, seed=0)
    assert got.tokens.tolist() == [[2, 1, 1]]


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_the_batch_size_does_not_change_windows(batch_size: int) -> None:
    ask = {"length": 20, "bos": 0, "seed": 3}
    whole = sample_windows(chain, num_windows=7, **ask)
    cut = sample_windows(chain, num_windows=7, batch_size=batch_size, **ask)
    assert torch.equal(whole.tokens, cut.tokens)
    fewer = sample_windows(chain, num_windows=4, **ask)
    assert torch.equal(whole.tokens[:4], fewer.tokens)
    other = sample_windows(chain, num_windows=7, length=20, bos=0, seed=4)
    assert other.digest != whole.digest
    assert other.documents_digest != whole.documents_digest


def test_the_cache_gives_the_logits_of_a_full_pass(llama_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_folder).eval()
    step = CachedStep(model)
    generator = torch.Generator().manual_seed(0)
    for batch in (3, 2):  # the second batch must not see the first one's cache
        tokens = torch.randint(0, 128, (batch, 9), generator=generator)
        for t in range(1, 10):
            with torch.no_grad():
                full = model(tokens[:, :t], use_cache=False).logits[:, -1]
            torch.testing.assert_close(step(tokens[:, :t]), full, rtol=1e-4, atol=1e-4)


def test_self_windows_are_samples_of_the_whole_model(llama_folder: Path) -> None:
    tokenizer = make_tokenizer(bos_token="<s>", eos_token="</s>")
    model = AutoModelForCausalLM.from_pretrained(llama_folder).eval()

    @torch.no_grad()
    def full_pass(tokens: Tensor) -> Tensor:
        logits: Tensor = model(tokens, use_cache=False).logits[:, -1]
        return logits

    ask = {"num_windows": 5, "length": 12, "seed": 2}
    got = self_windows(llama_folder, tokenizer, batch_size=2, **ask)
    assert torch.equal(got.tokens, sample_windows(full_pass, bos=1, **ask).tokens)
    loaded = load_windows(parse_source("self"), tokenizer, model_dir=llama_folder, **ask)
    assert torch.equal(loaded.tokens, got.tokens)
    from_eos = self_windows(llama_folder, make_tokenizer(eos_token="</s>"), **ask)
    assert (from_eos.tokens[:, 0] == 2).all()


def test_what_cannot_be_sampled_is_refused(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer(bos_token="<s>")
    ask = {"num_windows": 1, "length": 4, "seed": 0}
    with pytest.raises(ModelError, match="no safetensors found"):
        self_windows(tmp_path / "none", tokenizer, **ask)
    with pytest.raises(CalibrationError, match="neither a BOS nor an EOS"):
        self_windows(llama_folder, make_tokenizer(), **ask)
    with pytest.raises(CalibrationError, match="no local model to sample from"):
        load_windows(parse_source("self"), tokenizer, **ask)
    (llama_folder / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be loaded"):
        self_windows(llama_folder, tokenizer, **ask)
    monkeypatch.setattr(sampling, "MAX_MODEL_BYTES", 1000)
    with pytest.raises(CalibrationError, match=r"GiB of weights, over the limit .*use text:FILE"):
        self_windows(llama_folder, tokenizer, **ask)


def test_logits_that_are_not_finite_and_impossible_options() -> None:
    def broken(tokens: Tensor) -> Tensor:
        logits = chain(tokens)
        logits[0, 0] = math.nan if tokens.shape[1] == 3 else logits[0, 0]
        return logits

    with pytest.raises(ModelError, match="behind token 2 are not finite"):
        sample_windows(broken, num_windows=2, length=8, bos=0, seed=0)
    for options in ({"temperature": 0.0}, {"temperature": math.nan}, {"batch_size": 0}, {"length": 1}):
        with pytest.raises(ConfigError):
            sample_windows(chain, **{"num_windows": 2, "length": 8, "bos": 0, "seed": 0, **options})
